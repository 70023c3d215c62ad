"""A search among fixed schedules that needs no gradient: within so many calls of the model, judged by true error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.journal import Journal, digest
from lazy_compile.planning.replay import Replayable, Trajectory, continued_at, replayed_steps, run_trajectory
from lazy_compile.planning.search import HELD_OUT_SEED_OFFSET, relative_loss, robust_losses
from lazy_compile.planning.slope_fits import OutputSamples, SlopeFits, Table
from lazy_compile.planning.step_paths import POWERS, StepCosts
from lazy_compile.planning.whole_step_starts import every_nth, fitting, rules
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.sampling import Sampler, require_finite

Floats = npt.NDArray[np.float64]

Way = Callable[[Table], Floats | None]
"""The slopes ``float64[T, G]`` of decisions ``bool[T, G]``; None follows the line all the way."""

FINALISTS = 3
"""Schedules that are compared on noise of their own."""

STARTS, EXCHANGES = 0.4, 0.7
"""Shares of the calls after which starts, and exchanges of whole steps, have had their turn. The simplest starts may
take as many as exchanges."""

PARTS = 4
"""Groups of neighbouring branches that are exchanged at the end."""

SLOPES = (0.8, 0.6)
"""Of all branches, tried instead of fitted ones."""


@dataclass(frozen=True)
class _Judged:
    schedule: CacheSchedule
    way: Way
    errors: Floats

    @property
    def mean(self) -> float:
        return float(self.errors.mean())


@dataclass
class CallSearch:
    """From whole steps to groups of branches.

    1. One dense trajectory is recorded. What its outputs tell of every choice of steps (:mod:`.step_paths`) orders the
       starts of :mod:`.starts`, and adds the shortest paths. Every n-th step after a warm-up takes turns with them and
       goes on when they have had theirs. What its branches computed gives each schedule its slopes
       (:mod:`.slope_fits`); the best start is tried without them, too.
    2. The best of them is improved by exchanging one step that computes for one that reuses, in the order in which the
       same costs, with the weights that agreed best with what was measured, promise most.
    3. Groups of neighbouring branches spend what whole steps leave of the budget, and are exchanged.

    Every candidate is judged by the true error of the final samples. Its trajectory starts at the first step that
    differs from one that is known. The last few are compared on other noise.

    Attributes:
        target, samplers: what to run; several samplers count as one batch.
        cost: ``float64[G]`` of computing each branch once.
        budget: what a trajectory may spend.
        calls: of the model, in all.
        journal: what was measured before.
        keep_every: caches are kept before steps that this divides, where another trajectory can start.
    """

    target: Replayable
    samplers: Sequence[Sampler]
    cost: Floats
    budget: Budget
    calls: int
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    keep_every: int = 1
    used: int = field(default=0, init=False)
    _judged: dict[str, _Judged] = field(default_factory=dict, init=False)
    _kept: dict[tuple[int, str], Trajectory] = field(default_factory=dict, init=False)

    def run(self, seed: int, on_progress: OnProgress) -> CacheSchedule:
        """
        Raises:
            ConfigError: the budget or the calls do not suffice.
        """
        self._seed, self._on_progress = seed, on_progress
        self._calls_a_step = self._record_dense(seed)
        steps = self._steps
        self.spend = self.budget.spend(steps, self.cost) + 1e-9
        least = self._reserve + 2 * steps * self._calls_a_step
        if self.calls < least:
            raise ConfigError(f"{self.calls} calls are too few to compare two schedules of {steps} steps; give {least}")
        self.used = steps * self._calls_a_step
        first = self._judge_starts()
        best = self._in_other_ways(first)
        best = self._exchange_steps(best)
        best = self._exchange_groups(best)
        return self._final(best, first)

    # What is tried ------------------------------------------------------------------------------------------------

    def _judge_starts(self) -> _Judged:
        count, warmup = self._affordable(), self.target.warmup_steps
        first = every_nth(self._steps)
        every = [*first, *rules(self._steps, self._costs.change), *self._costs.rules(warmup)]
        chosen = [fitting(rule, count, warmup) for rule in every]
        tables = {steps.tobytes(): steps for steps in chosen if steps is not None}
        simple = {steps.tobytes() for steps in chosen[: len(first)] if steps is not None}
        ranks = np.mean(
            [_ranks([self._costs.cost(each, power) for each in tables.values()]) for power in POWERS], axis=0
        )
        by_rank = [name for _, name in sorted(zip(ranks, tables, strict=True))]
        lists = [[name for name in by_rank if (name in simple) == wanted] for wanted in (True, False)]
        best: _Judged | None = None
        for name in (name for pair in itertools.zip_longest(*lists) for name in pair if name is not None):
            share = EXCHANGES if name in simple else STARTS
            judged = self._judge(self._whole(tables[name]), self._ways[0], share if best else 1.0)
            if judged is not None:
                best = judged if best is None or self._loss(judged) < self._loss(best) else best
        assert best is not None
        return best

    @cached_property
    def _ways(self) -> list[Way]:
        """Fitted slopes, none, and the same for all."""
        ways: list[Way] = [lambda table: None]
        if self.target.order:
            ways += [partial(np.full_like, fill_value=slope, dtype=np.float64) for slope in SLOPES]
            ways.insert(0, self._fits.slopes)
        return ways

    def _in_other_ways(self, best: _Judged) -> _Judged:
        table = best.schedule.should_compute
        for way in self._ways[1:]:
            judged = self._judge(table, way, EXCHANGES)
            best = judged if judged is not None and self._loss(judged) < self._loss(best) else best
        return best

    def _exchange_steps(self, best: _Judged) -> _Judged:
        power = self._best_power()
        while True:
            steps = best.schedule.should_compute[:, 0]
            neighbours = sorted(self._neighbours(steps), key=lambda each: self._costs.cost(each, power))
            for neighbour in neighbours:
                table = self._whole(neighbour)
                if self._is_known(table, best.way):
                    continue
                judged = self._judge(table, best.way, EXCHANGES)
                if judged is None:
                    return best
                if self._loss(judged) < self._loss(best):
                    best = judged
                    break
            else:
                return best

    def _neighbours(self, steps: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.bool_]]:
        for dropped in np.flatnonzero(steps[self.target.warmup_steps :]) + self.target.warmup_steps:
            for taken in np.flatnonzero(~steps):
                moved = steps.copy()
                moved[[dropped, taken]] = False, True
                yield moved

    def _exchange_groups(self, best: _Judged) -> _Judged:
        draw = np.random.default_rng(self._seed)
        groups = self._groups
        while True:
            moves = list(self._group_moves(best.schedule.should_compute, groups))
            draw.shuffle(moves)
            moves.sort(key=len)  # what only computes more comes first
            before = best
            for move in moves:
                table = best.schedule.should_compute.copy()
                for step, group in move:
                    table[step, groups[group]] ^= True
                if self._is_known(table, best.way):
                    continue
                judged = self._judge(table, best.way, 1.0)
                if judged is None:
                    return best
                if self._loss(judged) < self._loss(best):
                    best = judged
                    break
            if best is before:
                return best

    def _group_moves(
        self, table: npt.NDArray[np.bool_], groups: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[list[tuple[int, int]]]:
        left = self.spend - float((table * self.cost).sum()) + 1e-9
        price = [float(self.cost[group].sum()) for group in groups]
        places = [
            (step, number) for step in range(self.target.warmup_steps, self._steps) for number in range(len(groups))
        ]
        on = [place for place in places if table[place[0], groups[place[1]]].all()]
        off = [place for place in places if not table[place[0], groups[place[1]]].any()]
        for taken in off:
            if price[taken[1]] <= left:
                yield [taken]
            yield from ([dropped, taken] for dropped in on if price[taken[1]] - price[dropped[1]] <= left)

    @cached_property
    def _groups(self) -> list[npt.NDArray[np.int64]]:
        """Neighbouring branches, those that share a decision together."""
        leaders = sorted(set(self.target.leaders))
        parts = np.array_split(np.array(leaders), min(PARTS, len(leaders)))
        return [np.flatnonzero(np.isin(self.target.leaders, part)) for part in parts]

    def _whole(self, steps: npt.NDArray[np.bool_]) -> Table:
        return np.repeat(steps[:, None], len(self.cost), axis=1)

    def _affordable(self) -> int:
        whole = float(self.cost.sum())
        count = self._steps if whole * self._steps <= self.spend else int((self.spend + 1e-9) / whole)
        if count < self.target.warmup_steps:
            raise ConfigError(
                "this budget cannot be met, since the first step computes everything; ask for less reuse, or more steps"
            )
        return count

    # How it is judged ---------------------------------------------------------------------------------------------

    def _loss(self, judged: _Judged) -> float:
        """The mean over samples of ``log(1 + error / typical)``, so that one that diverges does not decide."""
        medians = [float(np.median(each.errors)) for each in self._judged.values()]
        typical = next((median for median in medians if np.isfinite(median)), 1.0)
        return float(relative_loss(judged.errors, typical).mean())

    def _is_known(self, table: Table, way: Way) -> bool:
        return digest(CacheSchedule(table, way(table))) in self._judged

    def _judge(self, table: Table, way: Way, share: float) -> _Judged | None:
        """The errors of a schedule; None if its calls are more than are left of this share of all."""
        schedule = CacheSchedule(table, way(table))
        name = digest(schedule)
        if name in self._judged:
            return self._judged[name]
        bases = [self._dense, *(judged.schedule for judged in self._leaders_of_search)]
        begin = max(continued_at(base, schedule, self.keep_every) for base in bases)
        price = (self._steps - begin) * self._calls_a_step
        if self.used + price > share * (self.calls - self._reserve):
            return None
        self.used += price
        self._judged[name] = _Judged(schedule, way, self._errors(schedule, self._seed, bases))
        self._on_progress("searching schedules", self.used, self.calls, f"error {self._least_error:.2e}")
        return self._judged[name]

    @property
    def _least_error(self) -> float:
        return float(min(judged.mean for judged in self._judged.values()) ** 0.5)

    @property
    def _leaders_of_search(self) -> list[_Judged]:
        """The best so far, whose trajectory is kept."""
        return sorted(self._judged.values(), key=self._loss)[:1]

    def _errors(self, schedule: CacheSchedule, seed: int, bases: Sequence[CacheSchedule]) -> Floats:
        name = f"judged-{seed}-{digest(schedule)}"
        return self.journal.array(name, lambda: self._measure(schedule, seed, bases))

    def _measure(self, schedule: CacheSchedule, seed: int, bases: Sequence[CacheSchedule]) -> Floats:
        errors: list[Floats] = []
        self._forget(seed, bases)
        for place, sample in enumerate(self.samplers):
            known = [each for base in bases if (each := self._kept.get((place, f"{seed}-{digest(base)}"))) is not None]
            base = max(known, key=lambda each: each.continues_at(schedule), default=None)
            ran = run_trajectory(self.target, sample, seed, schedule, base, self.keep_every)
            self._kept[place, f"{seed}-{digest(schedule)}"] = ran
            dense = self._dense_trajectory(place, seed).samples
            change = (ran.samples - dense).double().square().flatten(1).mean(1)
            errors.append(np.nan_to_num(change.cpu().numpy(), nan=np.inf, posinf=np.inf))
        return np.concatenate(errors)

    def _forget(self, seed: int, bases: Sequence[CacheSchedule]) -> None:
        kept = {f"{seed}-{digest(base)}" for base in bases}
        self._kept = {key: value for key, value in self._kept.items() if key[1] in kept}

    def _dense_trajectory(self, place: int, seed: int, samples: OutputSamples | None = None) -> Trajectory:
        key = place, f"{seed}-{digest(self._dense)}"
        if key not in self._kept:
            watch = None if samples is None else lambda call: samples.add(call.step, call.computed())
            sample = self.samplers[place]
            self._kept[key] = run_trajectory(self.target, sample, seed, self._dense, None, self.keep_every, watch)
            require_finite(self._kept[key].samples)
        return self._kept[key]

    def _record_dense(self, seed: int) -> int:
        """Calls of one step, in all batches."""
        steps = replayed_steps(self.target, self.samplers[0], seed)
        self._steps, self._dense = steps, CacheSchedule.always_compute(steps, len(self.cost))
        samples = OutputSamples()
        dense = [self._dense_trajectory(place, seed, samples) for place in range(len(self.samplers))]
        self._costs = StepCosts(
            self.journal.array("step-costs", lambda: StepCosts.of(dense, self.target.order > 0, fitted=True).miss)
        )
        inner = self.journal.array("inner-products", lambda: samples.inner_products(len(self.cost), steps))
        self._fits = SlopeFits(inner, self.target.order)
        return sum(len(each.steps) for each in dense) // self._steps

    def _best_power(self) -> float:
        """The weights under which the costs of whole steps agree best with the errors that were measured."""
        tables = [(judged, judged.schedule.should_compute) for judged in self._judged.values()]
        whole = [judged for judged, table in tables if judged.way == self._ways[0] and (table == table[:, :1]).all()]
        seen = _ranks([self._loss(judged) for judged in whole])

        def disagreement(power: float) -> float:
            costs = _ranks([self._costs.cost(judged.schedule.should_compute[:, 0], power) for judged in whole])
            return float(np.square(costs - seen).sum())

        return min(POWERS, key=disagreement)

    @property
    def _reserve(self) -> int:
        """Calls of the last comparison."""
        return (1 + FINALISTS) * self._steps * self._calls_a_step

    def _final(self, best: _Judged, start: _Judged) -> CacheSchedule:
        others = [each for each in sorted(self._judged.values(), key=self._loss) if each is not best]
        finalists = list({id(each): each for each in (best, start, *others)}.values())[:FINALISTS]
        seed = self._seed + HELD_OUT_SEED_OFFSET
        errors = np.stack([self._errors(each.schedule, seed, [self._dense]) for each in finalists])
        errors = np.concatenate([errors, np.stack([each.errors for each in finalists])], axis=1)
        losses = robust_losses(errors).mean(axis=1)
        if not np.isfinite(losses).any():
            raise ConfigError("samples are not finite under any schedule; ask for less reuse, or a wider dtype")
        self._on_progress("searching schedules", self.calls, self.calls, f"error {self._least_error:.2e}")
        return finalists[int(np.argmin(losses))].schedule


def _ranks(values: Sequence[float]) -> Floats:
    ranks: Floats = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)
    return ranks
