"""A model that exchanges tensors between processes: all of them take one decision, and nobody waits for ever."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed._functional_collectives import all_gather_tensor

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, Learned, Policy, Scheduled
from lazy_compile.policies.policy import GateQuery
from lazy_compile.processes import Processes
from support.layers import WIDTH, Attention
from support.small_model import SMALL, Small, run
from support.toy_models import trajectory

PROCESSES, STEPS = 2, 5


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


def outcome(model: nn.Module) -> dict[str, Any]:
    calls = trajectory(SMALL, 2, steps=STEPS)
    lazy = lazy_compile.transform(model, calls[0])
    found: dict[str, Any] = {"processes": Processes.beside(lazy.graph.collective_groups).count}
    for name, policy in policies().items():
        lazy.policy = policy
        found[name] = torch.stack(run(lazy, calls)), torch.from_numpy(lazy.stats.reuse_table)
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120)
    )
    torch.save(outcome(Shards(SMALL.model())), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_decide_as_one_process_does(tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES))
    alone = outcome(SMALL.model())
    assert first["processes"] == second["processes"] == 1
    for name in ("scheduled", "learned", "parted"):
        assert torch.equal(first[name][1], second[name][1])
        torch.testing.assert_close(first[name][0], second[name][0], atol=0, rtol=0)
        if name != "parted":
            assert torch.equal(first[name][1], alone[name][1])
            torch.testing.assert_close(first[name][0], alone[name][0], atol=1e-5, rtol=1e-5)
    assert 0 < float(alone["learned"][1].mean()) < 1
    assert not first["parted"][1].any()  # one of them computes at every step, so that all do
