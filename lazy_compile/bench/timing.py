"""Ways to do the same, timed side by side: on a machine that others use too, only their ratio means something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        baseline_ms: median time of a step of the baseline.
        other_ms: median time of a step of the other.
        ratio: median of the ratios of neighbouring steps, other over baseline: a machine that slows down for a while
            slows down both.
        quartiles: first and third quartile of these ratios: the noise.
        difference_ms: median of other less baseline at neighbouring steps.
    """

    baseline_ms: float
    other_ms: float
    ratio: float
    quartiles: tuple[float, float]
    difference_ms: float = 0.0


def time_in_turn(
    baseline: Callable[[int], object],
    other: Callable[[int], object],
    *,
    repeats: int,
    warm_steps: int,
    clock: Callable[[], float] | None = None,
) -> Timing:
    """Call both with the number of each step; which of them goes first changes from step to step.

    Args:
        baseline: what the other is compared with.
        other: what is compared.
        repeats: how many steps count, 2 or more.
        warm_steps: how many come before that do not.
        clock: seconds; by default those on the wall. ``time.process_time`` leaves out what other processes take, where
            all work is done by one thread of the CPU.
    """
    taken = all_in_turn({"baseline": baseline, "other": other}, repeats=repeats, warm_steps=warm_steps, clock=clock)
    first, second = taken["baseline"], taken["other"]
    low, middle, high = statistics.quantiles((b / a for a, b in zip(first, second, strict=True)), n=4)
    difference = statistics.median(b - a for a, b in zip(first, second, strict=True))
    return Timing(statistics.median(first), statistics.median(second), middle, (low, high), difference)


def all_in_turn(
    acts: Mapping[str, Callable[[int], object]],
    *,
    repeats: int,
    warm_steps: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every step of each, in turn; the order is turned round from step to step, see
    :func:`time_in_turn`."""
    clock = clock or time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for step in range(warm_steps + repeats):
        for name in list(acts) if step % 2 else list(acts)[::-1]:
            start = clock()
            acts[name](step)
            taken[name].append(1e3 * (clock() - start))
    return {name: times[warm_steps:] for name, times in taken.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread while it lasts.

    A small model gains nothing from a second one, and loses much where another process wants its core; a timing loses
    its meaning there, most of all where two runtimes keep threads of their own that wait by spinning.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
