"""A search among fixed schedules: whole steps first, then single branches, judged by what the final samples lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.baselines import measure_changes
from lazy_compile.effects import Sampler
from lazy_compile.errors import ConfigError
from lazy_compile.module import LazyModule
from lazy_compile.policy import Scheduled
from lazy_compile.progress import OnProgress
from lazy_compile.response import Response, dense_samples, measure_response
from lazy_compile.schedule import CacheSchedule
from lazy_compile.search import fit_slopes, swap

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchOptions:
    """How long a schedule is searched for.

    Attributes:
        step_rounds: times that the answer of the final samples is measured to move whole steps, each on other noise.
        rounds: the same to move the decisions of single branches.
        directions: see :func:`~lazy_compile.response.measure_response`.
        swaps: pairs of decisions that a round may exchange.
    """

    step_rounds: int = 2
    rounds: int = 4
    directions: int = 2
    swaps: int = 60


class ScheduleSearch:
    """A search among schedules whose branches decide as the model's groups have them."""

    def __init__(self, lazy: LazyModule, sample: Sampler, cost: Floats, spend: float, options: SearchOptions) -> None:
        """``cost: float64[G]`` of computing each branch once, ``spend`` what a trajectory may cost."""
        self.lazy, self.sample, self.cost, self.spend, self.options = lazy, sample, cost, spend + 1e-9, options
        self.leaders = lazy.graph.leaders(lazy.lazy_config.group)
        self.linear = lazy.lazy_config.reuse == "linear"

    def starts(self, steps: int, seed: int) -> list[CacheSchedule]:
        """As many whole steps as the budget allows, spread evenly, and by how much the model changes."""
        change = measure_changes(self.lazy, self.sample, seed=seed, max_age=1)[1:, 0].mean(axis=1)
        passed = np.append(0.0, np.cumsum(change)) / change.sum()
        return [self._fitting(np.arange(steps) / steps), self._fitting(passed * (steps - 1) / steps)]

    def _fitting(self, places: Floats) -> CacheSchedule:
        """Computations at equal distances of ``places: float64[T]``, which rise from 0 to below 1."""
        for count in range(len(places), 0, -1):
            computes = np.diff(np.floor(places * count + 1e-9), prepend=-1) > 0
            computes[: self.lazy.lazy_config.warmup_steps] = True
            if computes.sum() * self.cost.sum() <= self.spend:
                table = np.repeat(computes[:, None], len(self.leaders), axis=1)
                return CacheSchedule(table, None if self.linear else np.zeros(table.shape))
        raise ConfigError(
            "this budget cannot be met, since the first step computes everything; ask for less reuse, or more steps"
        )

    def run(self, starts: Sequence[CacheSchedule], seed: int, on_progress: OnProgress) -> CacheSchedule:
        """From the best start: rounds that move whole steps, then rounds that move single branches."""
        best = self._best(starts, seed + UNSEEN - 1)[0]
        deciding = sorted(set(self.leaders))
        each = [deciding.index(leader) for leader in self.leaders]
        whole = self.options.step_rounds if (best.should_compute == best.should_compute[:, :1]).all() else 0
        rounds, swaps, note = whole + self.options.rounds, self.options.swaps, ""
        for done in range(rounds):
            on_progress("searching schedules", done, rounds, note)
            leaders = [0] * len(each) if done < whole else each
            candidates = (best, *self._proposals(best, leaders, swaps, seed + done))
            chosen, error = self._best(candidates, seed + UNSEEN + done)
            swaps = swaps // 2 if chosen is best and done >= whole else swaps
            best, note = chosen, f"error {error**0.5:.2e}"
        on_progress("searching schedules", rounds, rounds, note)
        return best if self.linear else CacheSchedule(best.should_compute)

    def _proposals(self, schedule: CacheSchedule, leaders: list[int], swaps: int, seed: int) -> Iterator[CacheSchedule]:
        """Better schedules in which branches of one leader decide alike; ``leaders`` count from 0 without gaps."""
        measured = self.measure(schedule, seed)
        first = [leaders.index(leader) for leader in leaders]
        cost = np.array([self.cost[np.equal(leaders, leader)].sum() for leader in sorted(set(leaders))])
        response, warmup = measured.tied(first), self.lazy.lazy_config.warmup_steps
        found = swap(response, response.schedule, cost, self.spend, swaps, warmup_steps=warmup)
        yield found.of(leaders)
        if self.linear:
            for ridge in RIDGES:
                yield fit_slopes(response, found, ridge).of(leaders)

    def measure(self, schedule: CacheSchedule, seed: int) -> Response:
        return measure_response(self.lazy, self.sample, schedule, seed=seed, directions=self.options.directions)

    def _best(self, candidates: Sequence[CacheSchedule], seed: int) -> tuple[CacheSchedule, float]:
        """The schedule with the least mean squared error of the final samples on noise of ``seed``, and that error."""
        dense = dense_samples(self.lazy, self.sample, seed)
        judged = [(self._error(item, seed, dense), item) for item in candidates]
        error, best = min(judged, key=lambda item: item[0])
        return best, error

    def _error(self, schedule: CacheSchedule, seed: int, dense: Tensor) -> float:
        """Mean squared change of the final samples under a schedule."""
        policy, self.lazy.policy = self.lazy.policy, Scheduled(schedule)
        try:
            with torch.no_grad():
                samples = self.sample(self.lazy, seed)
        finally:
            self.lazy.policy = policy
        return float((samples - dense).double().square().mean())


RIDGES = (0.1, 1.0)
"""Proposals for the slopes: a small ridge is right near the schedule that was measured, a large one far from it."""

UNSEEN = 1_000_003
"""Distance from the seeds that tables are made from to those that they are judged on."""
