"""Models that two processes run together: tensor parallelism, FSDP, and context parallelism as diffusers sets it up."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.hooks import tensor_parallel as tensor_parallel_hooks
from diffusers.models._modeling_parallel import TensorParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lazy_compile
from lazy_compile import Budget, CacheSchedule, GateTable, LazyModule, Learned
from lazy_compile.errors import CaptureError
from support.diffusers_pipelines import normal, random_weights
from support.layers import TOKENS, WIDTH
from support.small_model import SMALL
from support.two_processes import PROCESSES, together

STEPS, CALLS = 4, 24

pytestmark = pytest.mark.slow


@torch.no_grad()
def sample(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        x = x - model(x=x, t=torch.full((2,), 1000.0 - 100 * step)) / STEPS
    return x


def outcome(lazy: LazyModule, sample: Callable[..., Tensor] = sample) -> dict[str, Any]:
    found: dict[str, Any] = {"dense": sample(lazy), "groups": lazy.graph.collective_groups}
    found["plan"] = lazy_compile.plan(lazy, sample, Budget(compute_ratio=0.7), calls=CALLS).to_json()
    lazy.policy = CacheSchedule.every(2, STEPS, len(lazy.branches))
    found |= {"lazy": sample(lazy), "ratio": lazy.stats.lazy_ratio}
    lazy.policy = gates(lazy)
    return found | {"gated": sample(lazy), "gated ratio": lazy.stats.lazy_ratio}


def gates(lazy: LazyModule) -> Learned:
    widths = tuple(branch.gate_features for branch in lazy.branches)
    weight = 0.3 * torch.randn(STEPS, sum(widths), generator=torch.Generator().manual_seed(3))
    bias = torch.zeros(STEPS, len(widths))
    bias[:, -1] = -10.0  # one of them reuses whenever it may
    return Learned(GateTable(widths, torch.arange(float(STEPS)).double(), weight, bias))


def refusal(call: Callable[[], Any]) -> str:
    """The message; empty if nothing was refused."""
    try:
        call()
    except CaptureError as error:
        return str(error)
    return ""


def tensor_parallel(model: nn.Module, **columns: Any) -> nn.Module:
    plan = {"mlp.up": ColwiseParallel(**columns), "mlp.down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (PROCESSES,)), plan)


def fully_sharded(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.get_submodule("mlp"), mesh=mesh)
    fully_shard(model, mesh=mesh)


def passing_shards_on(model: nn.Module) -> nn.Module:
    return tensor_parallel(model, use_local_output=False)


def split_before_and_after(split: Callable[[nn.Module], Any]) -> list[LazyModule]:
    """A lazy model whose original was split before, and one that was captured whole before its original was split."""
    before, after = SMALL.model(), lazy_compile.transform(SMALL.model())
    split(before)
    sample(after)
    split(after.original)
    return [lazy_compile.transform(before), after]


def work() -> dict[str, Any]:
    found: dict[str, Any] = {"split": [outcome(lazy) for lazy in split_before_and_after(tensor_parallel)]}
    for split in (fully_sharded, passing_shards_on):
        for lazy in split_before_and_after(split):
            expected = sample(lazy.original)
            message = refusal(lambda lazy=lazy: sample(lazy))  # type: ignore[misc]
            found.setdefault(split.__name__, []).append((message, torch.equal(sample(lazy.original), expected)))
    return found


def assert_equal(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["gated ratio"] == alone["gated ratio"] > 0
    for name in ("dense", "lazy", "gated"):
        torch.testing.assert_close(found[name], alone[name], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both processes."""
    return together(work, tmp_path_factory.mktemp("two"))


def test_layers_may_be_split_before_and_after(outcomes: list[dict[str, Any]]) -> None:
    alone = outcome(lazy_compile.transform(SMALL.model()))
    for found in [each for process in outcomes for each in process["split"]]:
        assert found["groups"]
        assert found["ratio"] == alone["ratio"] == 0.5
        assert found["plan"]["should_compute"] == alone["plan"]["should_compute"]
        assert not torch.equal(found["lazy"], found["dense"])
        assert_equal(found, alone)


@pytest.mark.parametrize(
    ("split", "seen"),
    [
        ("fully_sharded", r"sharded by FSDP, .* or split layers by tensor parallelism \(parallelize_module"),
        ("passing_shards_on", r"mlp\.(up|down) takes or returns a DTensor, .* without SequenceParallel"),
    ],
)
def test_what_does_not_go_is_one_line_and_the_original_goes_on(
    outcomes: list[dict[str, Any]], split: str, seen: str
) -> None:
    for message, is_intact in [each for process in outcomes for each in process[split]]:
        assert re.search(seen, message), message
        assert "\n" not in message
        assert is_intact


def flux() -> nn.Module:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=0, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return random_weights(model)


@torch.no_grad()
def sample_flux(model: nn.Module, seed: int = 0) -> Tensor:
    x, places = normal(1, 16, 8, seed=seed), torch.arange(16.0)
    ids = torch.stack([torch.zeros(16), places // 4, places % 4], 1)
    text = {"encoder_hidden_states": normal(1, 6, 12), "pooled_projections": normal(1, 10)}
    text |= {"img_ids": ids, "txt_ids": torch.zeros(6, 3)}
    for step in range(STEPS):
        time = torch.tensor([1.0 - step / STEPS])
        x = x - model(hidden_states=x, timestep=time, **text, return_dict=False)[0] / STEPS
    return x


def ulysses(model: Any) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))


def split_by_diffusers(model: Any) -> None:
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=PROCESSES))


def diffusers_work(split: Callable[[nn.Module], Any]) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)  # diffusers counts GPUs, and takes no CPU
        patch.setattr(tensor_parallel_hooks, "_SUPPORTED_TP_DEVICES", ("cpu",))
        before, after = flux(), lazy_compile.transform(flux())
        split(before)
        sample_flux(after)
        split(after)
        return [outcome(lazy, sample_flux) for lazy in (lazy_compile.transform(before), after)]


@pytest.mark.parametrize("split", [ulysses, split_by_diffusers])
def test_diffusers_splits_a_model_before_and_after(split: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    alone = outcome(lazy_compile.transform(flux()), sample_flux)
    first, second = together(partial(diffusers_work, split), tmp_path, 900)
    assert [found["plan"] for found in first] == [found["plan"] for found in second]
    for found in [*first, *second]:
        assert found["groups"]
        assert found["ratio"] == alone["ratio"] == 0.5
        assert_equal(found, alone)
