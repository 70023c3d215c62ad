"""A search among fixed schedules, from several starts, judged by what the final samples lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.errors import ConfigError
from lazy_compile.planning.baselines import measure_changes
from lazy_compile.planning.linear_model import around_another, fit_slopes, swap, trim
from lazy_compile.planning.response import Response, dense_samples, measure_response
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.processes import Processes
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchOptions:
    """How long a schedule is searched for.

    Attributes:
        rounds: times that the answer of the final samples is measured around the best schedule, each on other noise, to
            exchange decisions; around every start it is measured once before.
        directions: see :func:`~lazy_compile.planning.response.measure_response`.
        swaps: pairs of decisions that a round may exchange.
        remembered: the latest rounds whose measurements count.
    """

    rounds: int = 5
    directions: int = 1
    swaps: int = 40
    remembered: int = 4

    @property
    def trajectories(self) -> int:
        """How many dense trajectories a search takes the time of, at most."""
        measuring, judged = 2 + 3 * self.directions, 1 + 5
        making_starts = 21 + 2 * measuring
        return making_starts + 3 * (measuring + judged) + 1 + self.rounds * (measuring + 1 + judged)


class ScheduleSearch:
    """A search among schedules whose branches decide as the model's groups have them."""

    def __init__(self, lazy: LazyModule, sample: Sampler, cost: Floats, spend: float, options: SearchOptions) -> None:
        """``cost: float64[G]`` of computing each branch once, ``spend`` what a trajectory may cost."""
        self.lazy, self.sample, self.cost, self.spend, self.options = lazy, sample, cost, spend + 1e-9, options
        self.leaders = lazy.graph.leaders(lazy.lazy_config.group)
        self.linear = lazy.lazy_config.reuse == "linear"

    def starts(self, steps: int, seed: int) -> list[CacheSchedule]:
        """Whole steps, spread evenly or by how much the model changes: the best that the budget allows, and the best of
        a step more, less those decisions that the final samples miss least."""
        change = measure_changes(self.lazy, self.sample, seed=seed, max_age=1)[1:, 0].mean(axis=1)
        passed = np.append(0.0, np.cumsum(change)) / change.sum()
        rules = []
        for places in (np.arange(steps) / steps, passed * (steps - 1) / steps):
            rules += [places + TINY, np.append(places[1:], 1.0) - TINY]  # each computation late, or early
        counts = [self._affordable(places) for places in rules]
        allowed, beyond = (
            self._best(
                [
                    self._whole_steps(places, min(count + more, steps))
                    for places, count in zip(rules, counts, strict=True)
                ],
                seed + HELD_OUT_SEED_OFFSET - 2,
            )[0]
            for more in (0, 1)
        )
        return [allowed, trim(self.measure(beyond, seed), self.cost, self.spend, **self._rules)]

    @property
    def _rules(self) -> dict[str, Any]:
        return {"leaders": self.leaders, "warmup_steps": self.lazy.lazy_config.warmup_steps}

    def _whole_steps(self, places: Floats, count: int) -> CacheSchedule:
        """Computations at equal distances of ``places: float64[T]``, which rise within 0 and 1."""
        computes = np.diff(np.floor(places * count), prepend=-1) > 0
        computes[: self.lazy.lazy_config.warmup_steps] = True
        table = np.repeat(computes[:, None], len(self.leaders), axis=1)
        return CacheSchedule(table, None if self.linear else np.zeros(table.shape))

    def _affordable(self, places: Floats) -> int:
        for count in range(len(places), 0, -1):
            if self._whole_steps(places, count).should_compute[:, 0].sum() * self.cost.sum() <= self.spend:
                return count
        raise ConfigError(
            "this budget cannot be met, since the first step computes everything; ask for less reuse, or more steps"
        )

    def run(self, starts: Sequence[CacheSchedule], seed: int, on_progress: OnProgress) -> CacheSchedule:
        """One round from every start, and from the best that came of it as many as the options say.

        Which start is best says little of what can be made of it. The result is compared with all starts once more, so
        that it is never worse than a simple rule on that noise.
        """
        total, swaps = len(starts) + self.options.rounds, self.options.swaps
        first: list[tuple[CacheSchedule, Response]] = []
        for place, start in enumerate(starts):
            on_progress("searching schedules", place, total)
            response = self.measure(start, seed + place)
            first += [(candidate, response) for candidate in (start, *self._proposals(response, swaps))]
        best, error = self._best([candidate for candidate, _ in first], seed + HELD_OUT_SEED_OFFSET - 1)
        measured = [response for candidate, response in first if candidate is best]
        for done in range(len(starts), total):
            on_progress("searching schedules", done, total, f"error {error:.2e}")
            measured = [*measured, self.measure(best, seed + done)][-self.options.remembered :]
            response = Response.joined([around_another(response, best) for response in measured])
            chosen, error = self._best((best, *self._proposals(response, swaps)), seed + HELD_OUT_SEED_OFFSET + done)
            if np.array_equal(chosen.should_compute, best.should_compute):
                swaps = max(1, swaps // 2)
            best = chosen
        on_progress("searching schedules", total, total, f"error {error:.2e}")
        best = self._best((best, *starts), seed + HELD_OUT_SEED_OFFSET + total)[0]
        return best if self.linear else CacheSchedule(best.should_compute)

    def _proposals(self, response: Response, swaps: int) -> Iterator[CacheSchedule]:
        """Other decisions with other slopes, and the same decisions with other slopes; whole steps move as such too."""
        whole = (response.schedule.should_compute == response.schedule.should_compute[:, :1]).all()
        for leaders in (self.leaders, [0] * len(self.leaders))[: 1 + bool(whole)]:
            rules = {**self._rules, "leaders": leaders}
            found = swap(response, response.schedule, self.cost, self.spend, swaps, **rules)
            if not self.linear:
                yield found
                continue
            for ridge in RIDGES:
                yield fit_slopes(response, found, ridge, self.leaders)
        if self.linear:
            yield fit_slopes(response, response.schedule, RIDGES[-1], self.leaders)

    def measure(self, schedule: CacheSchedule, seed: int) -> Response:
        return measure_response(self.lazy, self.sample, schedule, seed=seed, directions=self.options.directions)

    def _best(self, candidates: Sequence[CacheSchedule], seed: int) -> tuple[CacheSchedule, float]:
        """The schedule that changes the final samples least on noise of ``seed``, and their root mean square change.

        By the mean of ``log(1 + error / least median)`` over samples, the loss to which their :func:`cauchy_weights`
        belong. Several processes share the candidates.
        """
        dense = dense_samples(self.lazy, self.sample, seed)
        processes, errors = Processes.here(), np.zeros((len(candidates), len(dense)))
        for place in processes.share(range(len(candidates))):
            errors[place] = _errors(self.lazy, self.sample, candidates[place], seed, dense)
        errors = processes.sum(torch.from_numpy(errors)).numpy()
        best = int(robust_losses(errors).mean(axis=1).argmin())
        return candidates[best], float(errors[best].mean() ** 0.5)


def robust_losses(errors: Floats) -> Floats:
    """``log(1 + error / least median)`` of ``errors: float64[candidates, samples]``.

    One sample that diverged counts for little, as under :func:`~lazy_compile.planning.response.cauchy_weights`.
    """
    typical = max(float(np.median(errors, axis=1).min()), float(np.finfo(np.float64).tiny))
    return np.log1p(errors / typical)


def final_error(lazy: LazyModule, sample: Sampler, schedule: CacheSchedule, seed: int) -> float:
    """Root mean square change of the final samples under a schedule."""
    errors = _errors(lazy, sample, schedule, seed, dense_samples(lazy, sample, seed))
    return float(errors.mean() ** 0.5)


def _errors(lazy: LazyModule, sample: Sampler, schedule: CacheSchedule, seed: int, dense: Tensor) -> Floats:
    """``float64[B]``: mean squared change of each final sample under a schedule."""
    policy, lazy.policy = lazy.policy, Scheduled(schedule)
    try:
        with torch.no_grad():
            samples = sample(lazy, seed)
    finally:
        lazy.policy = policy
    errors: Floats = (samples - dense).double().square().flatten(1).mean(1).cpu().numpy()
    return errors


RIDGES = (0.3, 2.0)
"""Proposals for the slopes: a small ridge is right near the schedule that was measured, a large one far from it."""

TINY = 1e-9
"""Decides what falls on a border."""

HELD_OUT_SEED_OFFSET = 1_000_003
"""Distance from the seeds that tables are made from to those that they are judged on."""
