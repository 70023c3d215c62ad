"""The best fixed schedule under a budget, from measured effects."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.planning.journal import Journal, identity_of
from lazy_compile.planning.patterns import few_patterns
from lazy_compile.planning.response import NoGradientError
from lazy_compile.planning.reuse_effects import EffectTable, measure_effects
from lazy_compile.planning.search import HELD_OUT_SEED_OFFSET, ScheduleSearch, SearchOptions, final_error
from lazy_compile.planning.timings import BranchTimings, measure_timings
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler, count_steps

logger = logging.getLogger("lazy_compile")

Floats = npt.NDArray[np.float64]

AGE_EXPONENT = 2.5
"""How fast the effect of a reuse grows with its age in steps; measured on small class-conditional transformers."""


@dataclass(frozen=True)
class Budget:
    """How much to save, or to lose: exactly one of the four.

    Attributes:
        lazy_ratio: share of branch evaluations to reuse.
        compute_ratio: MACs to spend over dense MACs, always-on parts included.
        latency_ratio: time to spend over that of the dense model, by the timings of its branches.
        error: root mean square change of the final samples that may be caused, as cheaply as can be; for :func:`plan`.
    """

    lazy_ratio: float | None = None
    compute_ratio: float | None = None
    latency_ratio: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        ratios = [value for value in (self.lazy_ratio, self.compute_ratio, self.latency_ratio) if value is not None]
        if len(ratios) + (self.error is not None) != 1:
            raise ConfigError("a budget is a lazy_ratio, compute_ratio, latency_ratio or error; give exactly one")
        if ratios and not 0.0 < ratios[0] < 1.0:
            raise ConfigError(f"a budget lies between 0 and 1; seen {ratios[0]}")
        if self.error is not None and not self.error > 0.0:
            raise ConfigError(f"an error that may be caused is above 0; seen {self.error}")

    def cost_of(self, branches: Floats, total: float) -> Floats:
        """``float64[G]``: what computing each branch counts for, from the MACs or seconds of each and of a step."""
        return np.ones(len(branches)) if self.lazy_ratio is not None else branches / total

    def spend(self, steps: int, cost: Floats) -> float:
        """What the computed branches of a trajectory may cost in all."""
        if self.lazy_ratio is not None:
            return (1.0 - self.lazy_ratio) * steps * len(cost)
        ratio = self.compute_ratio if self.latency_ratio is None else self.latency_ratio
        assert ratio is not None
        return steps * (ratio - 1.0 + float(cost.sum()))

    def is_met_by(self, schedule: CacheSchedule, effects: EffectTable) -> bool:
        if self.lazy_ratio is not None:
            return schedule.lazy_ratio >= self.lazy_ratio
        ratio = self.compute_ratio if self.latency_ratio is None else self.latency_ratio
        assert ratio is not None
        return schedule.compute_ratio(effects.branch_macs.tolist(), effects.total_macs) <= ratio


@dataclass(frozen=True)
class PlannedReuse:
    """A schedule, and how sure of each decision it is.

    Attributes:
        schedule: the decisions.
        margin: ``float64[T, G]``, extra cost of the best schedule that reuses here over the best that computes here, in
            units of what computing here costs: positive computes, negative reuses, +inf at step 0.
        price: final mean squared error that one unit of computing is worth under the budget.
    """

    schedule: CacheSchedule
    margin: Floats
    price: float


def plan(
    lazy: LazyModule,
    sample: Sampler,
    budget: Budget,
    *,
    timings: BranchTimings | None = None,
    start: CacheSchedule | None = None,
    options: SearchOptions | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress = no_progress,
) -> CacheSchedule:
    """The schedule, with its slopes, that changes the final samples least under the budget.

    For a budget of error: the cheapest of several such schedules that causes no more.

    From whole steps, spread evenly or by how much the model changes, or from ``start``: measure how the final samples
    answer to every branch at every step, exchange decisions while that predicts less error, fit the slopes, keep what
    is truly best on noise that it was not made from, and measure again around it. Where the samples carry no gradient,
    the plan is made from the effects of single reuses instead.

    Args:
        lazy: a transformed model; its policy stays.
        sample: runs a trajectory; the more samples it draws at once, the less a plan is made for these alone.
        budget: what may be spent.
        timings: of the runtime that a ``latency_ratio`` is meant for; None measures them in PyTorch.
        start: a schedule to improve.
        options: how long to search.
        seed: of the noise.
        max_patterns: how many distinct rows the schedule may have, for as many lean engines or CUDA graphs; None for
            any number. Rows of the plan are joined at no more cost, and the slopes fitted again.
        checkpoint: a folder to resume from and to write to, a file for each measurement. An interrupted search that
            starts again with it ends at the same plan as one that was not. Without gradient it starts afresh.
        on_progress: see :mod:`lazy_compile.progress`.

    Raises:
        ConfigError: the budget cannot be met, since the first step computes everything; or samples are not finite.
        ArtifactError: the checkpoint belongs to another model, budget or options.
    """
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget is {budget!r}; pass a Budget, such as Budget(compute_ratio=0.5)")
    if budget.error is not None:
        return _cheapest(lazy, sample, budget.error, options, seed, max_patterns, checkpoint, on_progress)
    try:
        return search_schedule(
            lazy, sample, budget, timings=timings, start=start, options=options, seed=seed, max_patterns=max_patterns,
            checkpoint=checkpoint, on_progress=on_progress,
        )  # fmt: skip
    except NoGradientError as error:
        if budget.latency_ratio is not None:
            raise
        logger.warning("planning from single reuses, which is slower and finds less: %s", error)
        effects = measure_effects(lazy, sample, seed=seed, on_progress=on_progress)
        planned = plan_reuse(effects, budget).schedule
        cost = budget.cost_of(effects.branch_macs, effects.total_macs)
        return planned if max_patterns is None else few_patterns(planned, max_patterns, cost)


def _cheapest(
    lazy: LazyModule,
    sample: Sampler,
    error: float,
    options: SearchOptions | None,
    seed: int,
    max_patterns: int | None,
    checkpoint: str | Path | None,
    on_progress: OnProgress,
) -> CacheSchedule:
    """The plan of least compute, by bisection, that causes no more error on noise that it was not made from."""
    steps, branches = count_steps(lazy, sample, seed), len(lazy.branches)
    best, high = CacheSchedule.always_compute(steps, branches), 1.0
    low = 1.0 - sum(branch.macs for branch in lazy.branches) / lazy.graph.total_macs
    low += (high - low) / steps  # the first step computes everything
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        schedule = plan(
            lazy, sample, Budget(compute_ratio=ratio), options=options, seed=seed, max_patterns=max_patterns,
            checkpoint=Path(checkpoint, f"compute-{ratio:.6f}") if checkpoint else None, on_progress=on_progress,
        )  # fmt: skip
        if final_error(lazy, sample, schedule, seed + 2 * HELD_OUT_SEED_OFFSET) <= error:
            best, high = schedule, ratio
        else:
            low = ratio
    return best


BISECTIONS = 4
"""Plans that are made for a budget of error: the last halves what is left to know of its compute to 6 points."""


def search_schedule(
    lazy: LazyModule,
    sample: Sampler,
    budget: Budget,
    *,
    timings: BranchTimings | None = None,
    start: CacheSchedule | None = None,
    options: SearchOptions | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress = no_progress,
) -> CacheSchedule:
    """:func:`plan` for samplers that let gradients through.

    Raises:
        NoGradientError: this one does not.
    """
    steps = count_steps(lazy, sample, seed)
    options = options or SearchOptions()
    identity = identity_of(
        lazy, budget=budget, options=options, seed=seed, steps=steps, timings=timings, start=start and start.to_json()
    )
    journal = Journal(Path(checkpoint) if checkpoint else None, identity)
    if budget.latency_ratio is not None and timings is None:
        times = journal.array("timings", lambda: measure_timings(lazy, sample, seed=seed).as_array)
        timings = BranchTimings(times[:-1], float(times[-1]))
    each, total = np.array([branch.macs for branch in lazy.branches], dtype=np.float64), float(lazy.graph.total_macs)
    if timings is not None:
        each, total = timings.branches, timings.total
    cost = budget.cost_of(each, total)
    search = ScheduleSearch(lazy, sample, cost, budget.spend(steps, cost), options, journal)
    starts = [start] if start else [*search.starts(steps, seed), *_by_single_reuses(search, budget, steps, seed)]
    found = search.run(starts, seed, on_progress)
    return found if max_patterns is None else search.with_few_patterns(found, max_patterns, seed)


def _by_single_reuses(search: ScheduleSearch, budget: Budget, steps: int, seed: int) -> list[CacheSchedule]:
    """The plan that adds up first-order effects of single reuses; none if branches share decisions."""
    branches = len(search.cost)
    if len(set(search.leaders)) < branches:
        return []
    final = search.measure(CacheSchedule.always_compute(steps, branches), seed).of_single_reuses(search.linear)
    effects = EffectTable(final, final, np.zeros(steps), np.maximum(search.cost, 1e-9), 1)
    planned = plan_reuse(effects, budget).schedule
    return [planned if search.linear else CacheSchedule(planned.should_compute, np.zeros(final.shape))]


def margins_of(schedule: CacheSchedule, harm: Floats, cost: Floats) -> PlannedReuse:
    """How sure a schedule that was searched for is of its decisions, from the harm of reuse around it.

    Args:
        schedule: the decisions; a margin never contradicts one.
        harm: from :func:`~lazy_compile.planning.linear_model.harm_of_reuse`.
        cost: ``float64[G]`` of computing each branch.
    """
    worth = harm[1:] / np.maximum(cost, 1e-9)
    computed = schedule.should_compute[1:]
    least = LEAST_PRICE * float(np.median(np.abs(worth)))
    price = max(float(np.quantile(worth, 1 - computed.mean())), least, float(np.finfo(np.float64).tiny))
    margin = np.full(harm.shape, np.inf)
    relative = worth / price - 1
    margin[1:] = np.where(computed, np.maximum(relative, MIN_MARGIN), np.minimum(relative, -MIN_MARGIN))
    return PlannedReuse(schedule, margin, price)


LEAST_PRICE = 0.1
"""Of computing, over the typical worth of a decision: a price near 0 would make every decision look sure."""

MIN_MARGIN = 0.25
"""Margin of a decision that the measurement would take the other way."""


def plan_reuse(effects: EffectTable, budget: Budget) -> PlannedReuse:
    """Lagrangian relaxation: each branch is planned alone at a common price, found by bisection.

    The effects of single reuses are taken to add up, and to grow with the age of what is reused as
    ``age ** AGE_EXPONENT``. For one branch the best plan at a price is then a shortest path over (step, age).

    Raises:
        ConfigError: the budget cannot be met, since the first step computes everything.
    """
    cost = budget.cost_of(effects.branch_macs, effects.total_macs)

    def at(price: float) -> PlannedReuse:
        margins = np.stack(
            [_margins(effects.final[:, branch], price * cost[branch]) for branch in range(len(cost))], axis=1
        )
        return PlannedReuse(CacheSchedule(margins >= 0), margins, price)

    finite = effects.final[np.isfinite(effects.final)]
    scale = float(finite.mean()) if len(finite) and finite.any() else 1.0
    low, high = _bracket(lambda price: budget.is_met_by(at(price).schedule, effects), scale)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if budget.is_met_by(at(middle).schedule, effects) else (middle, high)
    return at(high)


def _bracket(is_met: Callable[[float], bool], scale: float) -> tuple[float, float]:
    price = scale * 1e-9
    for _ in range(100):
        if is_met(price):
            return price / 10, price
        price *= 10
    raise ConfigError(
        "this budget cannot be met, since the first step computes everything; ask for less reuse, or more steps"
    )


def _margins(effect: Floats, price: float) -> Floats:
    """``float64[T]``: cost of the best path that reuses at a step less that of the best that computes, per price.

    ``arriving[t, a]``: least cost of the steps before t, if the cache is a steps old at t.
    ``leaving[t, a]``: least cost of the steps from t on, if the cache is a steps old at t.
    """
    steps = len(effect)
    ages = np.arange(steps + 2)
    penalty = np.where(ages > 0, ages, 1.0) ** AGE_EXPONENT
    reuse = np.nan_to_num(effect, nan=np.inf)[:, None] * penalty[None, :]
    arriving = np.full((steps + 1, steps + 2), np.inf)
    arriving[0, 1] = 0.0
    for step in range(steps):
        arriving[step + 1, 1] = arriving[step].min() + price
        arriving[step + 1, 2:] = np.minimum(arriving[step + 1, 2:], (arriving[step] + reuse[step])[1:-1])
    leaving = np.zeros((steps + 1, steps + 2))
    for step in reversed(range(steps)):
        older = np.append(leaving[step + 1, 1:], np.inf)
        leaving[step] = np.minimum(price + leaving[step + 1, 1], reuse[step] + older)
    margin = np.full(steps, np.inf)
    for step in range(1, steps):
        older = np.append(leaving[step + 1, 1:], np.inf)
        computes = arriving[step].min() + price + leaving[step + 1, 1]
        reuses = (arriving[step] + reuse[step] + older).min()
        margin[step] = (reuses - computes) / price
    return margin
