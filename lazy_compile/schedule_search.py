"""A search among fixed schedules: whole steps first, then single branches, judged by what the final samples lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.baselines import measure_changes
from lazy_compile.effects import Sampler
from lazy_compile.errors import ConfigError
from lazy_compile.module import LazyModule
from lazy_compile.policy import Scheduled
from lazy_compile.processes import Processes
from lazy_compile.progress import OnProgress
from lazy_compile.response import Response, dense_samples, measure_response
from lazy_compile.schedule import CacheSchedule
from lazy_compile.search import around_another, fit_slopes, swap, trim

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchOptions:
    """How long a schedule is searched for.

    Attributes:
        step_rounds: times that the answer of the final samples is measured to move whole steps, each on other noise.
        rounds: the same to move the decisions of single branches.
        directions: see :func:`~lazy_compile.response.measure_response`.
        swaps: pairs of decisions that a round may exchange.
        remembered: the latest rounds whose measurements count.
    """

    step_rounds: int = 2
    rounds: int = 5
    directions: int = 1
    swaps: int = 40
    remembered: int = 4

    @property
    def trajectories(self) -> int:
        """How many dense trajectories a search takes the time of, at most."""
        measuring = 2 + 3 * self.directions
        return 21 + 2 * measuring + (self.step_rounds + self.rounds) * (measuring + 1 + 4)


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
                seed + UNSEEN - 2,
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
        """From the best start: rounds that move whole steps, then rounds that move single branches.

        The result is compared with all starts once more, so that it is never worse than a simple rule on that noise.
        """
        best = self._best(starts, seed + UNSEEN - 1)[0]
        whole = self.options.step_rounds if (best.should_compute == best.should_compute[:, :1]).all() else 0
        rounds, swaps, note = whole + self.options.rounds, self.options.swaps, ""
        measured: list[Response] = []
        for done in range(rounds):
            on_progress("searching schedules", done, rounds, note)
            measured = [*measured, self.measure(best, seed + done)][-self.options.remembered :]
            response = Response.joined([around_another(response, best) for response in measured])
            leaders = [0] * len(self.leaders) if done < whole else self.leaders
            candidates = (best, *self._proposals(response, leaders, swaps))
            chosen, error = self._best(candidates, seed + UNSEEN + done)
            moved = (chosen.should_compute != best.should_compute).any()
            swaps = swaps if moved or done < whole else max(1, swaps // 2)
            best, note = chosen, f"error {error:.2e}"
        on_progress("searching schedules", rounds, rounds, note)
        best = self._best((best, *starts), seed + UNSEEN + rounds)[0]
        return best if self.linear else CacheSchedule(best.should_compute)

    def _proposals(self, response: Response, leaders: Sequence[int], swaps: int) -> Iterator[CacheSchedule]:
        """Other decisions with other slopes, and the same decisions with other slopes."""
        rules = {**self._rules, "leaders": leaders}
        found = swap(response, response.schedule, self.cost, self.spend, swaps, **rules)
        if not self.linear:
            yield found
            return
        for ridge in RIDGES:
            yield fit_slopes(response, found, ridge, self.leaders)
        yield fit_slopes(response, response.schedule, RIDGES[-1], self.leaders)

    def measure(self, schedule: CacheSchedule, seed: int) -> Response:
        return measure_response(self.lazy, self.sample, schedule, seed=seed, directions=self.options.directions)

    def _best(self, candidates: Sequence[CacheSchedule], seed: int) -> tuple[CacheSchedule, float]:
        """The schedule that changes the final samples least on noise of ``seed``, and their root mean square change.

        By the mean of ``log(1 + error / least median)`` over samples, the loss to which their :func:`trust` belongs.
        Several processes share the candidates.
        """
        dense = dense_samples(self.lazy, self.sample, seed)
        processes, errors = Processes.here(), np.zeros((len(candidates), len(dense)))
        for place in processes.share(range(len(candidates))):
            errors[place] = _errors(self.lazy, self.sample, candidates[place], seed, dense)
        errors = processes.sum(torch.from_numpy(errors)).numpy()
        typical = max(float(np.median(errors, axis=1).min()), float(np.finfo(np.float64).tiny))
        best = int(np.log1p(errors / typical).mean(axis=1).argmin())
        return candidates[best], float(errors[best].mean() ** 0.5)


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

UNSEEN = 1_000_003
"""Distance from the seeds that tables are made from to those that they are judged on."""
