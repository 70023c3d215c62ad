"""What planning is simulated to take is what it takes, by the allocator's own account."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lazy_compile import LazyModule, transform
from lazy_compile.bench.full_size_plans import euler_steps, simulate
from lazy_compile.bench.simulated_memory import SimulatedMemory, fused_attention
from lazy_compile.planning.estimate import estimate_plan
from lazy_compile.planning.output_store import Streaming
from lazy_compile.planning.sample_response import measure_response
from lazy_compile.policies.schedule import CacheSchedule
from support.sampling import inputs
from support.toy_networks import TinyDiT

STEPS, BATCH, SIZE = 5, 2, 48


def call_on(device: str) -> dict[str, Any]:
    given = inputs(torch.zeros(BATCH, 3, SIZE, SIZE), 1000.0)
    return {name: value.to(device) for name, value in given.items()}


def lazy_on(device: str) -> LazyModule:
    return transform(TinyDiT().eval().to(device), call_on(device))


def sample_on(device: str) -> Any:
    return euler_steps(call_on(device), "x", STEPS, guided=False)


def allocated(lazy: LazyModule, sample: Any, streaming: Streaming) -> int:
    """The most bytes that torch allocates on the CPU at once."""
    schedule = CacheSchedule.every(2, STEPS, len(lazy.branches))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        measure_response(lazy, sample, schedule, seed=0, streaming=streaming)
    assert profiled.profiler is not None
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


if __name__ == "__main__":
    for r in (False, True):
        s = Streaming(repeat_branches=r)
        lazy = lazy_on("cpu")
        a = allocated(lazy, sample_on("cpu"), s)
        lazy = lazy_on("meta")
        m, p = simulate(lazy, sample_on("meta"), STEPS, s)
        with fused_attention():
            print(a, m.peak, p, p["response"]/a, estimate_plan(lazy, sample_on("meta")))
