"""What a plan will take, before it is begun; and how to keep to a limit of memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from lazy_compile.errors import ConfigError, shown
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.planning.output_store import Place, Streaming
from lazy_compile.planning.search import SearchOptions
from lazy_compile.planning.trace import MAX_AGE
from lazy_compile.runtime.cache_format import CacheFormat
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.sampling import DenseStep, Samplers, parts_of

GRADIENTS = 2
"""Gradients that there are at once on the way back through a branch, each as large as the largest tensor that is saved:
those behind and before an operator."""

DIRECTION = 8
"""Bytes on the host of each number of a direction that samples may change along: it is drawn, and copied once."""


@dataclass(frozen=True)
class PlanEstimate:
    """What making a plan takes at most, beside the model itself.

    Attributes:
        steps: calls of one trajectory at different times.
        model_calls: evaluations of the whole model, those on the way back counted by their time.
        seconds: as many times what one dense call took.
        device_bytes: on the device of the model.
        host_bytes: in the memory of the host; the same memory where the model is on the CPU, and counted once.
        disk_bytes: in a temporary file.
        streaming: how memory is spared by a search with gradient.
        keep_every: before how many steps caches are kept by one without, see
            :class:`~lazy_compile.planning.call_search.CallSearch`.
    """

    steps: int
    model_calls: int
    seconds: float
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    streaming: Streaming
    keep_every: int = 1


def estimate_plan(
    lazy: LazyModule,
    sample: Samplers,
    *,
    options: SearchOptions | None = None,
    calls: int | None = None,
    max_memory: int | None = None,
    max_host_memory: int | None = None,
    seed: int = 0,
) -> PlanEstimate:
    """Run the model once at the sizes of ``sample``, timed; later calls of the trajectory repeat its answer.

    Arguments are those of :func:`lazy_compile.plan`; ``max_memory`` are bytes on the model's device, beside the model.
    ``max_host_memory`` are bytes that may be taken of the host's memory, by default half of what it has: outputs of
    branches that are more lie in a temporary file.

    Raises:
        ConfigError: no way to plan keeps to ``max_memory`` and ``max_host_memory``.
    """
    samplers = parts_of(sample)
    costs = [_measure(lazy, each, seed) for each in samplers]
    largest = replace(max(costs, key=lambda each: each.output_bytes), latents=sum(each.latents for each in costs))
    trajectory = sum(each.calls for each in costs)
    seconds = sum(each.calls * each.seconds for each in costs) / trajectory
    model_calls = calls if calls is not None else (options or SearchOptions()).trajectories * trajectory
    if calls is None:
        estimates = [
            _with_gradient(largest, streaming, model_calls, seconds, lazy, options or SearchOptions())
            for streaming in _ways(largest.device)
        ]
    else:
        estimates = [
            _without_gradient(largest, keep_every, model_calls, seconds, lazy)
            for keep_every in (1, *range(lazy.lazy_config.values_kept + 1, largest.steps + 1))
        ]
    if max_memory is None:
        return estimates[0]
    on_host = _host_memory() // 2 if max_host_memory is None else max_host_memory
    for estimate in estimates:
        if estimate.device_bytes <= max_memory and (largest.device.type == "cpu" or estimate.host_bytes <= on_host):
            return estimate
    least, allowed, where = min(estimate.device_bytes for estimate in estimates), max_memory, "memory"
    if least <= max_memory:
        least = min(estimate.host_bytes for estimate in estimates if estimate.device_bytes <= max_memory)
        allowed, where = on_host, "the host's memory"
    raise ConfigError(
        f"a plan takes at least {_gigabytes(least)} of {where} beside the model, and {_gigabytes(allowed)} are "
        "allowed; draw fewer samples at once (give several samplers), transform with a coarser granularity"
        + (" or with cache_device='cpu', or allow more" if where == "memory" else ", or allow more")
    )


def parse_bytes(text: str) -> int:
    """``"4GB"``, ``"512 MiB"`` or a number of bytes.

    Raises:
        ConfigError: it is something else.
    """
    units = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"{shown(text)} is no size of memory; expected one such as 4GB or 512MiB")
    return size


def _ways(device: torch.device) -> Iterator[Streaming]:
    """From the fastest to the one that takes least memory."""
    kept: tuple[Place, ...] = ("device", "disk") if device.type == "cpu" else ("device", "host", "disk")
    for repeat in (False, True):
        for keep in kept:
            yield Streaming(keep, repeat_branches=repeat)


def _with_gradient(
    costs: _CallCosts, streaming: Streaming, model_calls: int, seconds: float, lazy: LazyModule, settings: SearchOptions
) -> PlanEstimate:
    outputs, on_cpu = costs.outputs_a_step, costs.device.type == "cpu"
    kept = outputs * costs.steps
    judging, host = _judging(costs, lazy)
    saved = costs.outside + (costs.largest_branch if streaming.repeat_branches else costs.inside)
    waiting = lazy.lazy_config.values_kept * outputs  # gradients of what was reused, until the way back is there
    measuring = saved + GRADIENTS * costs.largest_saved + costs.output_bytes + waiting
    measuring += costs.latent_bytes * costs.calls
    measuring += kept if streaming.keep == "device" or (streaming.keep == "host" and on_cpu) else 0
    answers = 4 * costs.rows * costs.steps * len(lazy.branches) * (MAX_AGE + 1)
    host += 3 * settings.remembered * answers + DIRECTION * settings.directions * costs.latents
    host += kept if streaming.keep == "host" else 0
    host += costs.largest_output if streaming.keep == "disk" and not on_cpu else 0  # on its way
    device, host = _together(max(judging, measuring), host, on_cpu)
    disk = kept if streaming.keep == "disk" else 0
    return PlanEstimate(costs.steps, model_calls, model_calls * seconds, device, host, disk, streaming)


def _without_gradient(
    costs: _CallCosts, keep_every: int, model_calls: int, seconds: float, lazy: LazyModule
) -> PlanEstimate:
    """Caches before every ``keep_every``-th step, of the dense and the best trajectory, beside those that judge."""
    device, host = _judging(costs, lazy)
    times = -(-costs.steps // keep_every)
    values = costs.steps if keep_every == 1 else times * lazy.lazy_config.values_kept  # else shared between steps
    states = int(2 * cached_share(lazy) * costs.outputs_a_step * values)
    if lazy.lazy_config.cache_device is None:
        device += states
    else:
        host += states
    device, host = _together(device, host, costs.device.type == "cpu")
    return PlanEstimate(costs.steps, model_calls, model_calls * seconds, device, host, 0, Streaming(), keep_every)


def _judging(costs: _CallCosts, lazy: LazyModule) -> tuple[int, int]:
    """Bytes on the device and on the host of a trajectory that is judged."""
    config = lazy.lazy_config
    caches = int(config.values_kept * cached_share(lazy) * costs.outputs_a_step)
    computing = costs.largest_branch + costs.output_bytes
    return (computing + caches, 0) if config.cache_device is None else (computing, caches)


def _together(device: int, host: int, on_cpu: bool) -> tuple[int, int]:
    return (device + host, device + host) if on_cpu else (device, host)


def cached_share(lazy: LazyModule) -> float:
    """Bytes of a value in a cache, over those of the same value as the model computes it."""
    computed = sum(branch.output_bytes for branch in lazy.branches)
    form = CacheFormat.of(lazy.lazy_config)
    return sum(map(form.bytes, lazy.branches)) / computed if computed else 1.0


def _host_memory() -> int:
    """Bytes that the host has; no end of them where it does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class _CallCosts:
    """One call, in bytes and seconds.

    Attributes:
        output_bytes: what all branches return.
        inside, outside: what is saved for gradients in branches, and between them.
        largest_branch: of one branch.
        largest_saved, largest_output: of one tensor that is saved, or returned by a branch.
        latent_bytes: of the latents that a call is given, and of those that it returns: the way back needs them.
        latents: numbers in these.
        rows: samples.
        steps, calls: of the trajectory.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    output_bytes: int = 0
    inside: int = 0
    outside: int = 0
    largest_branch: int = 0
    largest_saved: int = 0
    largest_output: int = 0
    latent_bytes: int = 0
    latents: int = 0
    seconds: float = 0.0
    rows: int = 1
    steps: int = 0
    calls: int = 0

    @property
    def outputs_a_step(self) -> int:
        return self.output_bytes * self.calls // self.steps


def _measure(lazy: LazyModule, sample: Any, seed: int) -> _CallCosts:
    costs = _CallCosts()
    answers: list[Any] = []

    def answer(call: ModelCall) -> Any:
        costs.steps, costs.calls = max(costs.steps, call.step + 1), costs.calls + 1
        if not answers:
            _count(call, costs)  # the first one prepares kernels
            begun = time.perf_counter()
            answers.append(call.run(DenseStep()))
            _wait_for(costs.device)
            costs.seconds = time.perf_counter() - begun
            returned = [leaf for leaf in pytree.tree_leaves(answers[0]) if isinstance(leaf, Tensor)]
            costs.latents = sum(leaf.numel() for leaf in returned)
            costs.latent_bytes = 2 * sum(leaf.nbytes for leaf in returned)
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, answers[0])

    with torch.no_grad(), lazy.call_handler(answer):
        costs.rows = len(sample(lazy, seed))
    return costs


def _count(call: ModelCall, costs: _CallCosts) -> None:
    """Run forward as on the way back, and count what is saved instead of saving it."""
    counting = _Counting(costs)
    given = [each.detach().requires_grad_(each.is_floating_point()) for each in call.tensors]
    held = [*call.state, *given, *call.invariants]
    for each in held:
        counting.is_new(each)
    costs.device = given[0].device
    with torch.enable_grad(), counting.hooks():
        replace(call, tensors=given, state=[each.detach() for each in call.state]).run(counting)


@dataclass
class _Counting(DenseStep):
    costs: _CallCosts
    seen: dict[int, StorageWeakRef] = field(default_factory=dict)
    within: int | None = None

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        self.within = 0
        outputs = branch.compute(inputs)
        self.costs.inside += self.within
        self.costs.largest_branch = max(self.costs.largest_branch, self.within)
        self.within = None
        self.costs.output_bytes += sum(output.nbytes for output in outputs)
        self.costs.largest_output = max(self.costs.largest_output, *(output.nbytes for output in outputs))
        return outputs

    def is_new(self, tensor: Tensor) -> bool:
        """Whether its memory was not counted; that of a tensor which is gone may be another's now."""
        reference = StorageWeakRef(tensor.untyped_storage())
        known = self.seen.get(reference.cdata)
        if known is not None and not known.expired():
            return False
        self.seen[reference.cdata] = reference
        return True

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> None:
            size = tensor.untyped_storage().nbytes() if self.is_new(tensor) else 0
            self.costs.largest_saved = max(self.costs.largest_saved, size)
            if self.within is None:
                self.costs.outside += size
            else:
                self.within += size

        with torch.autograd.graph.saved_tensors_hooks(pack, _never):
            yield


def _never(_: object) -> Tensor:
    raise AssertionError("nothing goes back while it is counted")


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
