"""A search among fixed schedules, from several starts, judged by what the final samples lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.errors import ConfigError
from lazy_compile.planning.journal import Journal, digest
from lazy_compile.planning.linear_model import around_another, fit_slopes, swap, trim
from lazy_compile.planning.output_store import Streaming
from lazy_compile.planning.patterns import few_patterns
from lazy_compile.planning.replay import replayable, run_trajectory
from lazy_compile.planning.sample_response import Response, dense_samples, measure_response
from lazy_compile.planning.step_paths import POWERS, StepCosts
from lazy_compile.planning.whole_step_starts import RULES, Rule, fitting, rules
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.processes import Processes, averaged
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.module import LazyGraph, LazyModule
from lazy_compile.runtime.sampling import Sampler, Samplers, parts_of

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchOptions:
    """How long a schedule is searched for.

    Attributes:
        rounds: times that the answer of the final samples is measured around the best schedule, each on other noise, to
            exchange decisions; around every start it is measured once before.
        directions: see :func:`~lazy_compile.planning.sample_response.measure_response`.
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
        making_starts = 1 + (1 + RULES + len(POWERS)) + (1 + FINALISTS) + 2 * measuring
        held_out = MOST_FINAL_SETS * (1 + 1 + 3 + FINALISTS)
        return making_starts + 3 * (measuring + judged) + held_out + self.rounds * (measuring + 1 + judged)


class ScheduleSearch:
    """A search among schedules whose branches decide as the model's groups have them."""

    def __init__(
        self,
        lazy: LazyModule,
        sample: Samplers,
        cost: Floats,
        spend: float,
        options: SearchOptions,
        journal: Journal | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        """``cost: float64[G]`` of computing each branch once, ``spend`` what a trajectory may cost."""
        self.lazy, self.samplers, self.cost, self.spend, self.options = (
            lazy,
            parts_of(sample),
            cost,
            spend + 1e-9,
            options,
        )
        self.streaming = streaming
        self.journal = journal or Journal(None, {})
        self.leaders = lazy.graph.leaders(lazy.lazy_config.group)
        self.order = lazy.lazy_config.values_kept - 1
        self.finalists: list[CacheSchedule] = []
        self._rows_are_samples: tuple[LazyGraph, bool] | None = None
        self._samples = 0

    def starts(self, steps: int, seed: int) -> list[CacheSchedule]:
        """Whole steps, see :mod:`lazy_compile.planning.whole_step_starts`: the best that the budget allows, and the
        best of a step more, less those decisions that the final samples miss least.

        The best few that the budget allows are held against the result of the search, see :meth:`run`.
        """
        costs, warmup_steps = self._step_costs(steps, seed), self.lazy.lazy_config.warmup_steps
        every = [*rules(steps, costs.change), *costs.rules(warmup_steps)]
        count, judged = self._affordable(steps), seed + HELD_OUT_SEED_OFFSET - 2
        allowed = self._chosen(every, count)
        order, _ = self._ranked([schedule for schedule, _ in allowed], [judged])
        best = [allowed[place] for place in order[:FINALISTS]]
        self.finalists = [schedule for schedule, _ in best]
        with_one_more = self._chosen([rule for _, rule in best], min(count + 1, steps))
        beyond, _ = self._best([schedule for schedule, _ in with_one_more], judged)
        return [self.finalists[0], trim(self.measure(beyond, seed), self.cost, self.spend, **self._rules)]

    def _step_costs(self, steps: int, seed: int) -> StepCosts:
        def measured() -> Floats:
            always = CacheSchedule.always_compute(steps, len(self.cost))
            dense = [run_trajectory(replayable(self.lazy), each, seed, always, keep_every=0) for each in self.samplers]
            return StepCosts.of(dense, self.order > 0).miss

        return StepCosts(self.journal.array(f"step-costs-{seed}", measured))

    @property
    def _rules(self) -> dict[str, Any]:
        return {"leaders": self.leaders, "warmup_steps": self.lazy.lazy_config.warmup_steps}

    def _affordable(self, steps: int) -> int:
        """How many whole steps the budget allows."""
        whole = float(self.cost.sum())
        count = steps if whole * steps <= self.spend else int(self.spend / whole)
        if count < self.lazy.lazy_config.warmup_steps:
            raise ConfigError(
                "this budget cannot be met, since the first step computes everything; ask for less reuse, or more steps"
            )
        return count

    def _chosen(self, every: Sequence[Rule], count: int) -> list[tuple[CacheSchedule, Rule]]:
        """What rules choose for a number of whole steps, each schedule once."""
        found: dict[bytes, tuple[CacheSchedule, Rule]] = {}
        for rule in every:
            computes = fitting(rule, count, self.lazy.lazy_config.warmup_steps)
            if computes is not None:
                table = np.repeat(computes[:, None], len(self.leaders), axis=1)
                slopes = None if self.order else np.zeros(table.shape)
                found.setdefault(computes.tobytes(), (CacheSchedule(table, slopes), rule))
        return list(found.values())

    def run(self, starts: Sequence[CacheSchedule], seed: int, on_progress: OnProgress) -> CacheSchedule:
        """One round from every start, and from the best that came of it as many as the options say.

        Which start is best says little of what can be made of it. The result is compared with all starts and the best
        whole steps once more, on more noise than before, so that it is never worse than a simple rule on that noise.
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
        held_out = [seed + 2 * HELD_OUT_SEED_OFFSET + place for place in range(self._final_sets)]
        finalists = [best, *starts, *(each for each in self.finalists if each not in starts)]
        best = finalists[self._ranked(finalists, held_out)[0][0]]
        return best if self.order else CacheSchedule(best.should_compute)

    @property
    def _final_sets(self) -> int:
        return min(max(math.ceil(FINAL_SAMPLES / max(self._samples, 1)), LEAST_FINAL_SETS), MOST_FINAL_SETS)

    def with_few_patterns(self, found: CacheSchedule, max_patterns: int, seed: int) -> CacheSchedule:
        """A schedule whose rows are joined until few are distinct, with the slopes that then fit best."""
        joined = few_patterns(found, max_patterns, self.cost, self.leaders)
        if joined == found or not self.order:
            return joined
        response = self.measure(joined, seed)
        fitted = [fit_slopes(response, joined, ridge, self.leaders) for ridge in RIDGES]
        return self._best([joined, *fitted], seed + HELD_OUT_SEED_OFFSET - 3)[0]

    def _proposals(self, response: Response, swaps: int) -> Iterator[CacheSchedule]:
        """Other decisions with other slopes, and the same decisions with other slopes; whole steps move as such too."""
        whole = (response.schedule.should_compute == response.schedule.should_compute[:, :1]).all()
        for leaders in (self.leaders, [0] * len(self.leaders))[: 1 + bool(whole)]:
            rules = {**self._rules, "leaders": leaders}
            found = swap(response, response.schedule, self.cost, self.spend, swaps, **rules)
            if not self.order:
                yield found
                continue
            for ridge in RIDGES:
                yield fit_slopes(response, found, ridge, self.leaders)
        if self.order:
            yield fit_slopes(response, response.schedule, RIDGES[-1], self.leaders)

    def measure(self, schedule: CacheSchedule, seed: int) -> Response:
        graph, directions = self.lazy.graph, self.options.directions
        known = self._rows_are_samples[1] if self._rows_are_samples and self._rows_are_samples[0] is graph else None

        def measured() -> Response:
            return measure_response(
                self.lazy, self.samplers, schedule, seed=seed, directions=directions, rows_are_samples=known,
                streaming=self.streaming,
            )  # fmt: skip

        response = self.journal.response(schedule, seed, self.order, measured)
        self._rows_are_samples = (graph, len(response.error) > directions)
        return response

    def _best(self, candidates: Sequence[CacheSchedule], seed: int) -> tuple[CacheSchedule, float]:
        """The schedule that changes the final samples least on noise of ``seed``, and their root mean square change."""
        order, errors = self._ranked(candidates, [seed])
        return candidates[order[0]], errors[order[0]]

    def _ranked(self, candidates: Sequence[CacheSchedule], seeds: Sequence[int]) -> tuple[list[int], list[float]]:
        """Places of the schedules, the one that changes the final samples least first, and the root mean square change
        of each, by its place.

        By the mean over samples of :func:`robust_losses`; of those that are equal, the first.

        Raises:
            ConfigError: no schedule leaves the samples finite.
        """
        errors = np.concatenate([self._judge(candidates, seed) for seed in seeds], axis=1)
        losses = robust_losses(errors).mean(axis=1)
        if not np.isfinite(losses).any():
            raise ConfigError(
                f"samples are not finite under any of {len(candidates)} schedules, and those of the original are; "
                "ask for less reuse, or run the model in a wider dtype"
            )
        root_mean_square = np.sqrt(errors.mean(axis=1))
        return np.argsort(losses, kind="stable").tolist(), root_mean_square.tolist()

    def _judge(self, candidates: Sequence[CacheSchedule], seed: int) -> Floats:
        """``float64[candidates, B]``: mean squared change of each sample; several processes share the candidates."""
        names = [f"judged-{seed}-{digest(candidate)}" for candidate in candidates]
        known = {name: recalled["values"] for name in names if (recalled := self.journal.recall(name)) is not None}
        missing = [place for place, name in enumerate(names) if name not in known]
        if missing:
            dense = [dense_samples(self.lazy, each, seed) for each in self.samplers]
            processes = Processes.beside(self.lazy.graph.collective_groups)
            errors = np.zeros((len(missing), sum(map(len, dense))))
            for row in processes.share(range(len(missing))):
                errors[row] = _errors(self.lazy, self.samplers, candidates[missing[row]], seed, dense)
                if processes.count == 1:
                    self.journal.write(names[missing[row]], {"values": errors[row]})
            errors = processes.sum(torch.from_numpy(errors)).numpy()
            for row, place in enumerate(missing):
                known[names[place]] = errors[row]
                if processes.count > 1:
                    self.journal.write(names[place], {"values": errors[row]})
        self._samples = len(known[names[0]])
        return np.stack([known[name] for name in names])


def robust_losses(errors: Floats) -> Floats:
    """``log(1 + error / least median)`` of ``errors: float64[candidates, samples]``.

    One sample that diverged counts for little, as under :func:`~lazy_compile.planning.sample_response.cauchy_weights`.
    """
    typical = float(np.median(errors, axis=1).min())
    return relative_loss(errors, typical) if np.isfinite(typical) else np.full(errors.shape, np.inf)


def relative_loss(errors: Floats, typical: float) -> Floats:
    """``log(1 + error / typical)``, however small ``typical`` is."""
    unit = np.log(max(typical, TINIEST))
    with np.errstate(divide="ignore"):
        loss: Floats = np.logaddexp(np.log(errors), unit) - unit
    return loss


def final_error(lazy: LazyModule, sample: Samplers, schedule: CacheSchedule, seed: int) -> float:
    """Root mean square change of the final samples under a schedule."""
    samplers = parts_of(sample)
    errors = _errors(lazy, samplers, schedule, seed, [dense_samples(lazy, each, seed) for each in samplers])
    return float(averaged(torch.tensor(errors.mean()), lazy.graph.collective_groups) ** 0.5)


def _errors(
    lazy: LazyModule, samplers: Sequence[Sampler], schedule: CacheSchedule, seed: int, dense: Sequence[Tensor]
) -> Floats:
    """``float64[B]``: mean squared change of each final sample under a schedule; infinite where one is not finite."""
    policy, lazy.policy = lazy.policy, Scheduled(schedule)
    try:
        with torch.no_grad():
            changes = [
                (sample(lazy, seed) - expected).double().square().flatten(1).mean(1).cpu()
                for sample, expected in zip(samplers, dense, strict=True)
            ]
    finally:
        lazy.policy = policy
    errors: Floats = torch.cat(changes).numpy()
    return np.nan_to_num(errors, nan=np.inf, posinf=np.inf)


FINALISTS = 4
"""Whole steps that are held against the result of a search."""

FINAL_SAMPLES = 192
"""Samples on which that is decided: so many that one which diverged does not decide."""

LEAST_FINAL_SETS, MOST_FINAL_SETS = 2, 6
"""Sets of noise that are drawn for them."""

RIDGES = (0.3, 2.0)
"""Proposals for the slopes: a small ridge is right near the schedule that was measured, a large one far from it."""

TINIEST = float(np.finfo(np.float64).tiny)
"""An error that is none."""

HELD_OUT_SEED_OFFSET = 1_000_003
"""Distance from the seeds that tables are made from to those that they are judged on."""
