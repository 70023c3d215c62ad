"""``lazy-compile plan``: a fixed schedule under a budget, or one from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lazy_compile.cli import options as given
from lazy_compile.cli.options import ModelOptions, SamplingOptions
from lazy_compile.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SamplingOptions, ModelOptions):
    """What ``lazy-compile plan`` takes."""

    output: given.Folder
    lazy_ratio: given.LazyRatio = None
    compute_ratio: given.ComputeRatio = None
    latency_ratio: Annotated[float | None, typer.Option(help="Time to spend over that of the dense model.")] = None
    error: Annotated[float | None, typer.Option(help="Root mean square change of the samples that may be caused.")] = (
        None
    )
    timings: Annotated[
        Path | None,
        typer.Option(help="JSON with the seconds of each branch and of a step, for --latency-ratio."),
    ] = None
    schedule_file: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Take a schedule: ours, SmoothCache's, routers, a steps_mask."),
    ] = None
    freeze: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Take what the gates in this folder decide for most samples.")
    ] = None
    max_patterns: Annotated[
        int | None, typer.Option(min=1, help="Distinct rows that the schedule may have, say one engine for each.")
    ] = None


def plan(options: PlanOptions) -> None:
    """Find the fixed schedule that changes the samples least under a budget, or take one from elsewhere."""
    from lazy_compile.cli.models import load_lazy, load_model, load_sampler
    from lazy_compile.planning import import_schedule as schedule_io
    from lazy_compile.planning import planner as planning
    from lazy_compile.planning.patterns import few_patterns
    from lazy_compile.planning.timings import BranchTimings
    from lazy_compile.policies.policy import Scheduled
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import facts, reuse_picture, show
    from lazy_compile.runtime.sampling import count_steps

    if options.timings is not None and options.latency_ratio is None:
        raise ConfigError("--timings count for a --latency-ratio only; give one")
    if options.schedule_file is not None and options.freeze is not None:
        raise ConfigError("--import and --freeze both give a schedule; give one of them")
    ready = options.schedule_file is not None or options.freeze is not None
    budget = (
        None
        if ready
        else planning.Budget(options.lazy_ratio, options.compute_ratio, options.latency_ratio, options.error)
    )
    named = load_model(options.model, options.shape or (), options.device)
    lazy = load_lazy(named, options.freeze, options.settings or ())
    sample = load_sampler(options.sampler, named, lazy, options.steps, options.scheduler)
    if options.schedule_file is not None:
        schedule = schedule_io.import_schedule(
            options.schedule_file, lazy.branches, count_steps(lazy, sample, options.seed)
        )
        if options.max_patterns is not None:
            schedule = few_patterns(schedule, options.max_patterns, np.array([branch.macs for branch in lazy.branches]))
    elif budget is None:
        sample(lazy, options.seed)
        schedule = schedule_io.freeze(lazy.stats, max_patterns=options.max_patterns)
    else:
        with progress_bars(not options.json) as on_progress:
            seconds = None if options.timings is None else BranchTimings.load(options.timings)
            schedule = planning.plan(
                lazy, sample, budget, timings=seconds, seed=options.seed, max_patterns=options.max_patterns,
                on_progress=on_progress,
            )  # fmt: skip
    lazy.policy = Scheduled(schedule)
    lazy.save(options.output)
    values = {
        "steps": schedule.steps,
        "lazy_ratio": schedule.lazy_ratio,
        "compute_ratio": schedule.compute_ratio([branch.macs for branch in lazy.branches], lazy.graph.total_macs),
        "output": str(options.output),
    }
    show(
        values | {"should_compute": schedule.to_json()["should_compute"]},
        options.json,
        reuse_picture([branch.name for branch in lazy.branches], (~schedule.should_compute).astype(float).tolist()),
        facts(values),
    )
