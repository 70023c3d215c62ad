"""What users do to a pipeline besides calling it: adapters, offloading, prompts and guidance that change on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.errors import ConfigError
from support import diffusers_pipelines
from support.diffusers_pipelines import STEPS, Case, normal, stable_diffusion, wan
from support.slow import slow_but

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
]
CPU = torch.device("cpu")


def flux() -> Case:
    """With its block of two streams alone, since every change of an adapter is captured anew."""
    return diffusers_pipelines.flux(single_layers=0)


def reuse_every_second_step(case: Case) -> None:
    case.model.policy = Scheduled(CacheSchedule.every(2, STEPS, len(case.model.branches)))


# LoRA


@dataclass(frozen=True)
class Adapter:
    """LoRA for the transformer of Flux, trained with a scale of 2, and saved.

    Attributes:
        trained: what the pipeline gives that it was trained in.
        folder: its weights, and its configuration.
        weights_alone: a folder without the configuration, as ``save_lora_weights`` writes it unless told otherwise.
    """

    trained: Tensor
    folder: Path
    weights_alone: Path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    case, folder, weights_alone = flux(), tmp_path_factory.mktemp("lora"), tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    layers = ["to_q", "to_out.0"]
    case.model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    weights = peft.utils.get_peft_model_state_dict(case.model)
    case.pipe.save_lora_weights(weights_alone, transformer_lora_layers=weights)
    config = {**case.model.peft_config["default"].to_dict(), "target_modules": layers}
    case.pipe.save_lora_weights(folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config)
    return Adapter(case.sample(), folder, weights_alone)


@pytest.mark.slow
def test_lora_weights_loaded_before_and_after(adapter: Adapter) -> None:
    before, after = flux(), flux()
    plain = before.sample()
    before.pipe.load_lora_weights(adapter.folder)
    dense = before.sample()
    assert torch.equal(dense, adapter.trained)
    assert not torch.allclose(dense, plain, atol=1e-3)
    lazy_compile.transform(before.pipe)
    assert torch.equal(before.sample(), dense)
    lazy_compile.transform(after.pipe)
    assert torch.equal(after.sample(), plain)
    after.pipe.load_lora_weights(adapter.folder)
    assert torch.equal(after.sample(), dense)
    for case in (before, after):
        reuse_every_second_step(case)
    assert torch.equal(before.sample(), after.sample())
    assert after.model.stats.lazy_ratio == 0.5


@pytest.mark.slow
def test_lora_without_its_configuration_has_another_scale_lazily_or_not(adapter: Adapter) -> None:
    case = flux()
    case.pipe.load_lora_weights(adapter.weights_alone)
    assert not torch.allclose(case.sample(), adapter.trained, atol=1e-3)
    lazy_compile.transform(case.pipe)
    case.pipe.set_adapters(case.pipe.get_active_adapters(), 2.0)
    assert torch.equal(case.sample(), adapter.trained)


@pytest.mark.slow
def test_each_change_of_lora_is_followed_bit_for_bit(adapter: Adapter) -> None:
    eager, case = flux(), flux()
    lazy_compile.transform(case.pipe)
    changes: list[Callable[[Any], Any]] = [
        lambda pipe: pipe.load_lora_weights(adapter.folder),
        lambda pipe: pipe.set_adapters(pipe.get_active_adapters(), 0.5),
        lambda pipe: pipe.fuse_lora(components=["transformer"]),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    seen = []
    for change in changes:
        for pipe in (eager.pipe, case.pipe):
            change(pipe)
        seen.append(eager.sample())
        assert torch.equal(case.sample(), seen[-1]), len(seen)
    loaded, scaled, fused, unloaded = seen
    assert not torch.allclose(loaded, scaled, atol=1e-3)
    assert torch.allclose(fused, scaled, atol=1e-4)
    assert torch.allclose(unloaded, fused, atol=1e-4)  # diffusers leaves what is fused where it is


# Offloading. The accelerator is the CPU here: which model is where cannot be seen, but every hook runs.


class Arrivals:
    """Counts how often the hook of ``enable_model_cpu_offload`` runs before a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from accelerate.hooks import CpuOffload

        self.models: list[nn.Module] = []
        original = CpuOffload.pre_forward

        def pre_forward(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.models.append(module)
            return original(hook, module, *args, **kwargs)

        monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)


@pytest.mark.parametrize("first", slow_but(["transform"], ["offload", "transform"]))
def test_model_offload_in_either_order(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrivals = flux(), Arrivals(monkeypatch)
    dense, original = case.sample(), case.model
    actions = [lambda: case.pipe.enable_model_cpu_offload(device="cpu"), lambda: lazy_compile.transform(case.pipe)]
    for action in actions if first == "offload" else reversed(actions):
        action()
    assert torch.equal(case.sample(), dense)
    reuse_every_second_step(case)
    case.sample()
    assert arrivals.models == [case.model] * 2 * STEPS  # never the model inside it
    assert (case.model.stats.lazy_ratio, case.model.stats.captures) == (0.5, 1)
    lazy_compile.restore(case.pipe)
    arrivals.models.clear()
    assert torch.equal(case.sample(), dense)
    assert arrivals.models == [original] * STEPS


def by_layers(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def by_groups(pipe: Any) -> None:
    pipe.enable_group_offload(CPU, CPU, num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [by_layers, by_groups])
def test_weights_that_come_and_go_are_refused(offload: Any) -> None:
    complaint = "come and go layer by layer .* use enable_model_cpu_offload"
    case = wan()
    offload(case.pipe)
    with pytest.raises(ConfigError, match=complaint):
        lazy_compile.transform(case.pipe)
    case = wan()
    lazy_compile.transform(case.pipe)
    offload(case.pipe)
    with pytest.raises(ConfigError, match=complaint):
        case.sample()


# What changes between samples, and within one


@pytest.mark.slow
def test_prompts_of_other_lengths_share_a_graph() -> None:
    short, case = wan(), wan()
    longer = {"prompt_embeds": normal(1, 9, 12), "negative_prompt_embeds": normal(1, 9, 12, seed=2)}
    dense = [short.sample(), short.sample(**longer), short.sample()]
    lazy_compile.transform(case.pipe)
    assert all(map(torch.equal, [case.sample(), case.sample(**longer), case.sample()], dense))
    reuse_every_second_step(case)
    case.sample(), case.sample(**longer)
    assert (case.model.stats.lazy_ratio, case.model.stats.captures) == (0.5, 1)


def stop_guidance(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
    """diffusers' own recipe: after step 2 the unconditional row is dropped, and the batch halves."""
    if step == 2:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


def test_rows_go_on_when_guidance_stops_early() -> None:
    case = stable_diffusion()
    options = {"callback_on_step_end": stop_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    dense = case.sample(**options)
    assert not torch.equal(dense, case.sample())
    lazy_compile.transform(case.pipe)
    assert torch.equal(case.sample(**options), dense)
    case.model.policy = Scheduled(CacheSchedule.every(5, STEPS, len(case.model.branches)))
    assert torch.isfinite(case.sample(**options)).all()
    computed = 1 - case.model.stats.reuse_table
    assert computed.all(axis=1).tolist() == [True, False, False, False, False, True]
    assert computed.any(axis=1).tolist() == [True, False, False, False, False, True]
