"""A model that exchanges tensors between processes: all of them take one decision, and nobody waits for ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_gather_tensor

import lazy_compile
from lazy_compile import Budget, CacheSchedule, GateTable, LazyModule, Learned, Policy, Scheduled
from lazy_compile.policies.policy import GateQuery
from lazy_compile.processes import Processes
from support.layers import TOKENS, WIDTH, Attention
from support.small_model import SMALL, Small, run
from support.toy_models import trajectory
from support.two_processes import PROCESSES, together

STEPS = 5

pytestmark = pytest.mark.slow


class Gathers(Attention):
    """Attends to the tokens of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        whole = all_gather_tensor(x.contiguous(), 1, distributed.group.WORLD)
        first = distributed.get_rank() * tokens
        return super().forward(whole)[:, first : first + tokens]


class Shards(nn.Module):
    """The small model, each process with its share of the tokens."""

    def __init__(self, small: Small) -> None:
        super().__init__()
        self.small = small
        attention = Gathers()
        attention.load_state_dict(small.attn.state_dict())
        small.attn = attention

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = x.shape[1] // PROCESSES
        first = distributed.get_rank() * tokens
        part = self.small(x[:, first : first + tokens], t)
        return all_gather_tensor(part.contiguous(), 1, distributed.group.WORLD)


class Parted(Policy):
    """A rule that finds otherwise in every process."""

    def should_compute(self, query: GateQuery) -> bool:
        return distributed.is_initialized() and distributed.get_rank() == query.step % PROCESSES


def policies() -> dict[str, Policy]:
    torch.manual_seed(3)
    bias = torch.tensor([0.05, -0.05]).repeat(STEPS, 1)
    table = GateTable((WIDTH, WIDTH), torch.arange(float(STEPS)).double(), torch.randn(STEPS, 2 * WIDTH) * 0.3, bias)
    return {"scheduled": Scheduled(CacheSchedule.every(2, STEPS, 2)), "learned": Learned(table), "parted": Parted()}


def sample(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        x = x - model(x=x, t=torch.full((2,), 1000.0 - 100 * step)) / STEPS
    return x


def outcome(model: nn.Module) -> dict[str, Any]:
    calls = trajectory(SMALL, 2, steps=STEPS)
    lazy = lazy_compile.transform(model, calls[0])
    found: dict[str, Any] = {"processes": Processes.beside(lazy.graph.collective_groups).count}
    for name, policy in policies().items():
        lazy.policy = policy
        found[name] = torch.stack(run(lazy, calls)), torch.from_numpy(lazy.stats.reuse_table)
    found["plan"] = lazy_compile.plan(lazy, sample, Budget(compute_ratio=0.7), calls=40).to_json()
    if distributed.is_initialized():
        found["apart"] = reused_apart(lazy, calls)
    return found


def shards_outcome() -> dict[str, Any]:
    return outcome(Shards(SMALL.model()))


def reused_apart(lazy: LazyModule, calls: list[dict[str, Any]]) -> Any:
    """What is reused where one of the processes goes on with another request at a step that reuses."""
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    for step, arguments in enumerate(calls):
        another = distributed.get_rank() == 1 and step == 3
        with torch.no_grad(), lazy.trajectory("another" if another else "first", step=step):
            lazy(**arguments)
    return lazy.stats.reuse_table


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both processes, and of one alone."""
    return [*together(shards_outcome, tmp_path_factory.mktemp("two")), outcome(SMALL.model())]


def test_all_processes_decide_as_one_process_does(outcomes: list[dict[str, Any]]) -> None:
    first, second, alone = outcomes
    assert first["processes"] == second["processes"] == 1
    for name in ("scheduled", "learned", "parted"):
        assert torch.equal(first[name][1], second[name][1])
        torch.testing.assert_close(first[name][0], second[name][0], atol=0, rtol=0)
        if name != "parted":
            assert torch.equal(first[name][1], alone[name][1])
            torch.testing.assert_close(first[name][0], alone[name][0], atol=1e-5, rtol=1e-5)
    assert 0 < float(alone["learned"][1].mean()) < 1
    assert not first["parted"][1].any()  # one of them computes at every step, so that all do


def test_all_processes_make_the_plan_of_one(outcomes: list[dict[str, Any]]) -> None:
    first, second, alone = (each["plan"] for each in outcomes)
    assert first == second
    assert first["should_compute"] == alone["should_compute"]
    np.testing.assert_allclose(first["slopes"], alone["slopes"], atol=1e-3)


def test_processes_that_see_different_requests_compute_and_do_not_wait(outcomes: list[dict[str, Any]]) -> None:
    for found in outcomes[:PROCESSES]:
        assert found["apart"][1].all()
        assert not found["apart"][3].any()
