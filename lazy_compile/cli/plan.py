"""``lazy-compile plan``: a fixed schedule under a budget, or one from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import ModelOptions, SamplingOptions
from lazy_compile.errors import ConfigError

if TYPE_CHECKING:
    from lazy_compile.planning.budget import Budget
    from lazy_compile.policies.schedule import CacheSchedule
    from lazy_compile.runtime.module import LazyModule
    from lazy_compile.runtime.sampling import Sampler


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SamplingOptions, ModelOptions):
    """What ``lazy-compile plan`` takes."""

    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write to.")] = None
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
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A prompt a line: MODEL is the folder of a pipeline, whose own call draws each.",
        ),
    ] = None
    call: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of the pipeline's call, such as height=512. Repeatable."),
    ] = None
    calls: Annotated[
        int | None, typer.Option(min=1, help="Search without gradient, within so many calls of the model.")
    ] = None
    max_memory: Annotated[
        str | None, typer.Option(metavar="4GB", help="Memory on the device, beside the model, that planning keeps to.")
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where measurements go, and from where an interrupted plan goes on."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, from one timed call of the model, and stop.")
    ] = False
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
    from lazy_compile.planning.budget import Budget
    from lazy_compile.planning.patterns import few_patterns
    from lazy_compile.runtime.sampling import count_steps

    if options.timings is not None and options.latency_ratio is None:
        raise ConfigError("--timings count for a --latency-ratio only; give one")
    if options.schedule_file is not None and options.freeze is not None:
        raise ConfigError("--import and --freeze both give a schedule; give one of them")
    if options.output is None and not options.dry_run:
        raise ConfigError("--output names the folder that the schedule is written to; give one, or --dry-run")
    ready = options.schedule_file is not None or options.freeze is not None
    if ready and options.dry_run:
        raise ConfigError("--dry-run says what a search takes; --import and --freeze search nothing")
    budget = None if ready else Budget(options.lazy_ratio, options.compute_ratio, options.latency_ratio, options.error)
    if options.prompts is not None:
        if budget is None:
            raise ConfigError("--prompts plan a pipeline; --import and --freeze take the model of one: leave out one")
        _plan_pipeline(options, budget)
        return
    if options.call:
        raise ConfigError(f"--call {options.call[0]} is an argument of a pipeline's call; give --prompts too")
    named = load_model(options.model, options.shape or (), options.device)
    lazy = load_lazy(named, options.freeze, options.settings or (), options.capture_cache)
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
        found = _searched(options, lazy, sample, budget)
        if found is None:
            return
        schedule = found
    _write(options, {"": lazy}, {"": schedule})


def _searched(options: PlanOptions, lazy: LazyModule, sample: Sampler, budget: Budget) -> CacheSchedule | None:
    """The plan; None if it was only asked what it takes."""
    from lazy_compile.planning.timings import BranchTimings
    from lazy_compile.plans import estimate_plan, plan
    from lazy_compile.progress import progress_bars

    limits = _limits(options)
    if options.dry_run:
        _show_estimates(options, {"": estimate_plan(lazy, sample, **limits)})
        return None
    with progress_bars(not options.json) as on_progress:
        seconds = None if options.timings is None else BranchTimings.load(options.timings)
        return plan(
            lazy, sample, budget, timings=seconds, max_patterns=options.max_patterns, checkpoint=options.checkpoint,
            on_progress=on_progress, **limits,
        )  # fmt: skip


def _plan_pipeline(options: PlanOptions, budget: Budget) -> None:
    from lazy_compile.cli.models import parse_options
    from lazy_compile.cli.pipelines import call_arguments, load_pipeline, read_prompts
    from lazy_compile.compiler import transform
    from lazy_compile.integrations.diffusers_pipeline import lazy_denoisers
    from lazy_compile.plans import estimate_plan, plan
    from lazy_compile.progress import progress_bars

    assert options.prompts is not None
    for name, value in (("sampler", options.sampler), ("scheduler", options.scheduler), ("shape", options.shape)):
        if value:
            raise ConfigError(f"--{name} is for single models; a pipeline samples by its own call: leave it out")
    prompts, call = read_prompts(options.prompts), call_arguments(options.call or ())
    if options.steps is not None:
        call["num_inference_steps"] = options.steps
    pipe = transform(
        load_pipeline(options.model, options.device),
        config=parse_options(options.settings or ()),
        capture_cache=options.capture_cache,
    )
    limits = _limits(options)
    if options.dry_run:
        _show_estimates(options, estimate_plan(pipe, prompts=prompts, **limits, **call))
        return
    with progress_bars(not options.json) as on_progress:
        schedules = plan(
            pipe, budget, prompts=prompts, max_patterns=options.max_patterns, checkpoint=options.checkpoint,
            on_progress=on_progress, **limits, **call,
        )  # fmt: skip
    _write(options, lazy_denoisers(pipe), schedules)


def _limits(options: PlanOptions) -> dict[str, Any]:
    from lazy_compile.planning.estimate import parse_bytes

    memory = None if options.max_memory is None else parse_bytes(options.max_memory)
    return {"calls": options.calls, "max_memory": memory, "seed": options.seed}


def _show_estimates(options: PlanOptions, estimates: Any) -> None:
    from lazy_compile.reporting.terminal_tables import facts, show

    values: dict[str, Any] = {}
    for name, estimate in estimates.items():
        lead = f"{name}: " if name else ""
        values |= {
            f"{lead}steps": estimate.steps,
            f"{lead}model calls": estimate.model_calls,
            f"{lead}seconds": estimate.seconds,
            f"{lead}GB on the device": estimate.device_bytes / 1e9,
            f"{lead}GB on the host": estimate.host_bytes / 1e9,
            f"{lead}GB on disk": estimate.disk_bytes / 1e9,
        }
    show(values, options.json, facts(values))


def _write(options: PlanOptions, lazies: Mapping[str, LazyModule], schedules: Mapping[str, CacheSchedule]) -> None:
    """Each schedule as an artefact; those of a pipeline where ``lazy_compile.load(folder, pipe)`` reads them."""
    from lazy_compile.integrations.diffusers_pipeline import GATES
    from lazy_compile.policies.policy import Scheduled
    from lazy_compile.reporting.terminal_tables import facts, reuse_picture, show

    assert options.output is not None
    told: dict[str, Any] = {}
    pictures, all_facts = [], []
    for name, schedule in schedules.items():
        lazy = lazies[name]
        lazy.policy = Scheduled(schedule)
        lazy.save(options.output / name / GATES if name else options.output)
        values = {
            "steps": schedule.steps,
            "lazy_ratio": schedule.lazy_ratio,
            "compute_ratio": schedule.compute_ratio([branch.macs for branch in lazy.branches], lazy.graph.total_macs),
            "output": str(options.output),
        }
        table = values | {"should_compute": schedule.to_json()["should_compute"]}
        told |= {name: table} if name else table
        pictures.append(
            reuse_picture([branch.name for branch in lazy.branches], (~schedule.should_compute).astype(float).tolist())
        )
        all_facts.append(facts({"model": name, **values} if name else values))
    show(told, options.json, *(each for pair in zip(pictures, all_facts, strict=True) for each in pair))
