"""What planning is simulated to take is what it takes, by the account of torch's own allocator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lazy_compile import LazyModule, transform
from lazy_compile.bench.full_size_plans import euler_steps, simulate
from lazy_compile.bench.simulated_memory import SimulatedMemory, fused_attention
from lazy_compile.errors import ConfigError
from lazy_compile.planning.estimate import PlanEstimate, estimate_plan
from lazy_compile.planning.output_store import Streaming
from lazy_compile.planning.sample_response import measure_response
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.sampling import Sampler
from support.sampling import inputs
from support.toy_networks import TinyDiT

STEPS, BATCH, SIZE = 5, 2, 48


def call_on(device: str) -> dict[str, Any]:
    given = inputs(torch.zeros(BATCH, 3, SIZE, SIZE), 1000.0)
    return {name: value.to(device) for name, value in given.items()}


@cache
def lazy_on(device: str, **options: Any) -> LazyModule:
    return transform(TinyDiT().eval().to(device), call_on(device), **options)


def sampler_on(device: str, guided: bool = False) -> Sampler:
    return euler_steps(call_on(device), "x", STEPS, guided)


def allocated(lazy: LazyModule, sample: Sampler, streaming: Streaming) -> int:
    """The most bytes that torch allocates on the CPU at once, for a response."""
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


@pytest.mark.parametrize("repeat_branches", [False, True])
def test_the_peak_is_that_of_the_allocator_where_tensors_are_real(repeat_branches: bool) -> None:
    streaming = Streaming(repeat_branches=repeat_branches)
    real = allocated(lazy_on("cpu"), sampler_on("cpu"), streaming)
    memory, phases = simulate(lazy_on("meta"), sampler_on("meta"), STEPS, streaming)
    assert phases["response"] + memory.peak["host"] == pytest.approx(real, rel=0.02)


def estimates(lazy: LazyModule, sample: Sampler) -> Iterator[PlanEstimate]:
    """From the one that takes most of the device."""
    limit = None
    while True:
        try:
            with fused_attention():
                estimate = estimate_plan(lazy, sample, max_memory=limit, max_host_memory=2**40)
        except ConfigError:
            return
        yield estimate
        limit = estimate.device_bytes - 1


@pytest.mark.parametrize(("guided", "options"), [(False, {}), (True, {"reuse": "taylor", "order": 2})])
def test_no_estimate_is_below_what_is_simulated(guided: bool, options: dict[str, Any]) -> None:
    lazy, sample, seen = lazy_on("meta", **options), sampler_on("meta", guided), []
    for estimate in estimates(lazy, sample):
        memory, phases = simulate(lazy, sample, STEPS, estimate.streaming)
        seen.append((estimate.streaming.keep, estimate.streaming.repeat_branches))
        assert memory.peak["device"] == max(phases.values()) <= estimate.device_bytes
        assert memory.peak["host"] <= estimate.host_bytes
        assert memory.peak["disk"] <= estimate.disk_bytes
    assert seen == [("device", False), ("host", False), ("host", True)]


def test_the_memory_that_does_not_suffice_is_named() -> None:
    lazy, sample = lazy_on("meta"), sampler_on("meta")
    with pytest.raises(ConfigError, match=r"GB of memory beside the model, and .*cache_device='cpu'"):
        estimate_plan(lazy, sample, max_memory=1, max_host_memory=2**40)
    with pytest.raises(ConfigError, match=r"GB of the host's memory beside the model, and .* granularity, or allow"):
        estimate_plan(lazy, sample, max_memory=2**40, max_host_memory=1)


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_kept_outputs_are_counted_where_they_lie(keep: Any) -> None:
    lazy = lazy_on("meta")
    memory, _ = simulate(lazy, sampler_on("meta"), STEPS, Streaming(keep))
    outputs = 4 * BATCH * (SIZE // 2) ** 2 * 32
    kept = STEPS * len(lazy.branches) * outputs
    assert memory.peak["disk"] == (kept if keep == "disk" else 0)
    assert kept * (keep == "host") <= memory.peak["host"] < kept * (keep == "host") + 2 * outputs


def test_a_storage_counts_once_until_it_is_freed() -> None:
    with SimulatedMemory() as memory:
        for _ in range(2):  # sizes that are known already count as well
            first = torch.empty(1000, device="meta")
            view = first.view(10, 100).t()
            assert memory.held["device"] == 4000
            second = view * 2
            assert memory.held["device"] == 8000
            del first, second
            assert memory.held["device"] == 4000
            del view
            assert memory.held["device"] == 0
    assert memory.peak == {"device": 8000, "host": 0, "disk": 0}


def test_weights_and_their_views_do_not_count() -> None:
    weight = torch.empty(100, 10, device="meta")
    with SimulatedMemory([weight]) as memory:
        product = torch.empty(5, 10, device="meta") @ weight.t()
        assert memory.held["device"] == 4 * product.numel() == 2000


def test_what_is_copied_to_the_host_reads_as_zeros() -> None:
    with SimulatedMemory() as memory:
        values = torch.empty(1000, device="meta")
        copy = values.to("cpu", torch.float64)
        assert memory.held == {"device": 4000, "host": 8000, "disk": 0}
        back = copy.to(values.device)
        assert back.is_meta
        assert memory.held == {"device": 12_000, "host": 8000, "disk": 0}
        assert not copy.any()
        assert torch.isfinite(values).all()
        assert not (values > 0).any()
        assert values.sum().item() == 1.0
        result = torch.ones(1000)
        result += values.cpu()
        result.copy_(values)
        del copy, result
        assert memory.held["host"] == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_keeps_no_scores_for_its_gradients(masked: bool, groups: int) -> None:
    tokens, heads = 2048, 4
    query = torch.empty(1, heads, tokens, 16, device="meta", requires_grad=True)
    key = torch.empty(1, heads // groups, tokens, 16, device="meta")
    mask = torch.empty(tokens, tokens, dtype=torch.bool, device="meta") if masked else None
    with fused_attention(), SimulatedMemory([query, key]) as memory:
        result = F.scaled_dot_product_attention(query, key, key, mask, enable_gqa=groups > 1)
        gradient = torch.autograd.grad(result.sum(), query)[0]
    assert result.shape == gradient.shape == query.shape
    assert memory.peak["device"] < 4 * heads * tokens**2
    assert isinstance(result, Tensor)
