"""The best fixed schedule under a budget, from measured effects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.call_search import CallSearch
from lazy_compile.planning.estimate import estimate_plan
from lazy_compile.planning.journal import Journal, identity_of
from lazy_compile.planning.patterns import few_patterns
from lazy_compile.planning.replay import replayable
from lazy_compile.planning.reuse_effects import EffectTable
from lazy_compile.planning.sample_response import NoGradientError
from lazy_compile.planning.search import HELD_OUT_SEED_OFFSET, ScheduleSearch, SearchOptions, final_error
from lazy_compile.planning.single_reuses import plan_reuse
from lazy_compile.planning.timings import BranchTimings, measure_timings
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress, progress_bars
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler, Samplers, count_steps, parts_of

logger = logging.getLogger("lazy_compile")

Floats = npt.NDArray[np.float64]

CALLS = 400
"""Calls of the model that a search without gradient makes, where nobody says."""

BISECTIONS = 4
"""Plans that are made for a budget of error: the last halves what is left to know of its compute to 6 points."""


def plan(
    lazy: Any,
    sample: Samplers,
    budget: Budget,
    *,
    timings: BranchTimings | None = None,
    start: CacheSchedule | None = None,
    options: SearchOptions | None = None,
    calls: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> CacheSchedule:
    """The schedule, with its slopes, that changes the final samples least under the budget.

    For a budget of error: the cheapest of several such schedules that causes no more.

    From whole steps, spread evenly, by how much the model changes or after a warm-up, or from ``start``: measure how
    the final samples answer to every branch at every step, exchange decisions while that predicts less error, fit the
    slopes, keep what is truly best on noise that it was not made from, and measure again around it.

    With ``calls``, where the samples carry no gradient, or where processes run one model together: a search that only
    runs the model, and judges by true error (:class:`~lazy_compile.planning.call_search.CallSearch`). It takes any
    sampler, compiled and quantised models, and engines.

    Args:
        lazy: a transformed model; its policy stays. With ``calls`` also an
            :class:`~lazy_compile.backends.denoiser.EngineDenoiser`.
        sample: runs a trajectory; the more samples it draws at once, the less a plan is made for these alone. Several
            samplers run one after the other and count as one batch that is not in memory at once.
        budget: what may be spent.
        timings: of the runtime that a ``latency_ratio`` is meant for; None measures them in PyTorch.
        start: a schedule to improve; with gradient only.
        options: how long to search with gradient.
        calls: of the model, that a search without gradient may make in all.
        max_memory: bytes on the model's device, beside the model, that a search keeps to. With gradient, outputs then
            lie on the host or in a temporary file, and branches are repeated on the way back, as far as need be.
            Without, caches are kept before fewer steps, so that a candidate takes more of the calls; for an engine it
            has no effect.
        seed: of the noise.
        max_patterns: how many distinct rows the schedule may have, for as many lean engines or CUDA graphs; None for
            any number. Rows of the plan are joined at no more cost, and the slopes fitted again.
        checkpoint: a folder to resume from and to write to, a file for each measurement. An interrupted search that
            starts again with it ends at the same plan as one that was not.
        on_progress: see :mod:`lazy_compile.progress`. None draws bars where standard error is a terminal.

    Raises:
        ConfigError: the budget cannot be met, since the first step computes everything; or samples are not finite.
        ArtifactError: the checkpoint belongs to another model, budget or options.
    """
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget is {budget!r}; pass a Budget, such as Budget(compute_ratio=0.5)")
    if calls is not None and start is not None:
        raise ConfigError("a search without gradient (calls=...) takes no start; leave out one of them")
    samplers, folder = parts_of(sample), Path(checkpoint) if checkpoint else None
    if isinstance(lazy, LazyModule) and not lazy.is_captured:
        count_steps(lazy, samplers[0], seed)
    with ExitStack() as stack:
        report = stack.enter_context(progress_bars()) if on_progress is None else on_progress
        if budget.error is not None:
            return _cheapest(
                lazy, samplers, budget.error, options, calls, max_memory, seed, max_patterns, folder, report
            )
        if calls is None and isinstance(lazy, LazyModule) and not lazy.graph.collective_groups:
            try:
                return search_schedule(
                    lazy, samplers, budget, timings=timings, start=start, options=options, max_memory=max_memory,
                    seed=seed, max_patterns=max_patterns, checkpoint=folder, on_progress=report,
                )  # fmt: skip
            except NoGradientError as error:
                logger.warning("searching within %d calls of the model, without gradient: %s", CALLS, error)
                folder = folder and folder / "calls"
        return search_by_calls(
            lazy, samplers, budget, calls or CALLS, timings=timings, max_memory=max_memory, seed=seed,
            max_patterns=max_patterns, checkpoint=folder, on_progress=report,
        )  # fmt: skip


def _cheapest(
    lazy: Any,
    samplers: Sequence[Sampler],
    error: float,
    options: SearchOptions | None,
    calls: int | None,
    max_memory: int | None,
    seed: int,
    max_patterns: int | None,
    checkpoint: Path | None,
    on_progress: OnProgress,
) -> CacheSchedule:
    """The plan of least compute, by bisection, that causes no more error on noise that it was not made from."""
    if not isinstance(lazy, LazyModule):
        raise ConfigError("a budget of error is for models in PyTorch; give a compute_ratio for an engine")
    steps, branches = count_steps(lazy, samplers[0], seed), len(lazy.branches)
    best, high = CacheSchedule.always_compute(steps, branches), 1.0
    low = 1.0 - sum(branch.macs for branch in lazy.branches) / lazy.graph.total_macs
    low += (high - low) / steps  # the first step computes everything
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        schedule = plan(
            lazy, samplers, Budget(compute_ratio=ratio), options=options, seed=seed, max_patterns=max_patterns,
            calls=None if calls is None else calls // BISECTIONS, max_memory=max_memory,
            checkpoint=checkpoint and checkpoint / f"compute-{ratio:.6f}", on_progress=on_progress,
        )  # fmt: skip
        if final_error(lazy, samplers, schedule, seed + 2 * HELD_OUT_SEED_OFFSET) <= error:
            best, high = schedule, ratio
        else:
            low = ratio
    return best


def search_schedule(
    lazy: LazyModule,
    sample: Samplers,
    budget: Budget,
    *,
    timings: BranchTimings | None = None,
    start: CacheSchedule | None = None,
    options: SearchOptions | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress = no_progress,
) -> CacheSchedule:
    """:func:`plan` for samplers that let gradients through.

    Raises:
        NoGradientError: this one does not.
    """
    samplers = parts_of(sample)
    steps = count_steps(lazy, samplers[0], seed)
    options = options or SearchOptions()
    identity = identity_of(
        lazy, budget=budget, options=options, seed=seed, steps=steps, timings=timings, batches=len(samplers),
        start=start and start.to_json(),
    )  # fmt: skip
    journal = Journal(Path(checkpoint) if checkpoint else None, identity)
    cost = _cost(lazy, samplers[0], budget, timings, seed, journal)
    streaming = None
    if max_memory is not None:
        streaming = estimate_plan(lazy, samplers, options=options, max_memory=max_memory, seed=seed).streaming
    search = ScheduleSearch(lazy, samplers, cost, budget.spend(steps, cost), options, journal, streaming)
    starts = [start] if start else [*search.starts(steps, seed), *_by_single_reuses(search, budget, steps, seed)]
    found = search.run(starts, seed, on_progress)
    return found if max_patterns is None else search.with_few_patterns(found, max_patterns, seed)


def search_by_calls(
    denoiser: Any,
    sample: Samplers,
    budget: Budget,
    calls: int,
    *,
    timings: BranchTimings | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress = no_progress,
) -> CacheSchedule:
    """:func:`plan` without gradient."""
    samplers, target = parts_of(sample), replayable(denoiser)
    identity = identity_of(denoiser, budget=budget, calls=calls, seed=seed, timings=timings, batches=len(samplers))
    groups = denoiser.graph.collective_groups if isinstance(denoiser, LazyModule) else ()
    journal = Journal(Path(checkpoint) if checkpoint else None, identity, groups)
    if budget.latency_ratio is not None and timings is None and not isinstance(denoiser, LazyModule):
        raise ConfigError(
            "a latency_ratio of an engine needs timings of its branches; give timings, or a compute_ratio"
        )
    cost = _cost(target, samplers[0], budget, timings, seed, journal)
    keep_every = 1
    if max_memory is not None and isinstance(denoiser, LazyModule):
        keep_every = estimate_plan(denoiser, samplers, calls=calls, max_memory=max_memory, seed=seed).keep_every
    found = CallSearch(target, samplers, cost, budget, calls, journal, keep_every).run(seed, on_progress)
    return found if max_patterns is None else few_patterns(found, max_patterns, cost, target.leaders)


def _cost(
    model: Any, sample: Sampler, budget: Budget, timings: BranchTimings | None, seed: int, journal: Journal
) -> Floats:
    """``float64[G]``: what computing each branch counts for."""
    target = replayable(model) if isinstance(model, LazyModule) else model
    if budget.latency_ratio is not None and timings is None:
        times = journal.array("timings", lambda: measure_timings(target.denoiser, sample, seed=seed).as_array)
        timings = BranchTimings(times[:-1], float(times[-1]))
    if timings is not None:
        return budget.cost_of(timings.branches, timings.total)
    each = np.array([branch.macs for branch in target.branches], dtype=np.float64)
    return budget.cost_of(each, float(target.total_macs))


def _by_single_reuses(search: ScheduleSearch, budget: Budget, steps: int, seed: int) -> list[CacheSchedule]:
    """The plan that adds up first-order effects of single reuses; none if branches share decisions."""
    branches = len(search.cost)
    if len(set(search.leaders)) < branches:
        return []
    final = search.measure(CacheSchedule.always_compute(steps, branches), seed).of_single_reuses()
    effects = EffectTable(final, final, np.zeros(steps), np.maximum(search.cost, 1e-9), 1)
    planned = plan_reuse(effects, budget).schedule
    return [planned if search.order else CacheSchedule(planned.should_compute, np.zeros(final.shape))]
