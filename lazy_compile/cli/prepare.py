"""The verbs that look at a model and make something of it: inspect, calibrate, plan, export."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lazy_compile.cli import options as given
from lazy_compile.errors import ConfigError

if TYPE_CHECKING:
    from lazy_compile.runtime.module import LazyModule
    from lazy_compile.runtime.sampling import Sampler as SampleFunction


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|ENGINE", help="A model, an engine that build wrote, or the log of a build."),
    ],
    shape: given.Shapes = None,
    options: given.Options = None,
    why_not: Annotated[
        bool, typer.Option("--why-not", help="Also list what was looked at and not gated, with the reason.")
    ] = False,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Print the graph as it is after this pass instead.")
    ] = None,
    expect: Annotated[
        int | None, typer.Option(metavar="N", help="Of the log of a build: how many branches it should have.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Of an engine: an .svg file to draw it to.")] = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> None:
    """Show the branches of a model: what they are, what they cost, and what caching them takes.

    Of an engine: what runs at every step, and in either arm of each branch; the exit code is 7 if a branch is missing
    or something heavy runs outside of it.
    """
    from lazy_compile.cli.engine import inspect_engine, is_engine

    if is_engine(model):
        inspect_engine(model, expect, picture, json)
        return
    if expect is not None or picture is not None:
        raise ConfigError(f"--expect and --picture are about engines; {model} is none: leave them out")
    from lazy_compile.cli.models import load_lazy, load_model
    from lazy_compile.reporting.tables import branch_table, inspection, inspection_summary, refusal_table, show

    lazy = load_lazy(load_model(model, shape or (), device), None, options or ())
    if after is not None:
        graph = _graph_after(lazy, after)
        show({"model": model, "after": after, "graph": graph}, json, graph)
        return
    values = inspection(model, lazy)
    refusals = [refusal_table(values)] if why_not and values["refusals"] else []
    show(values, json, branch_table(values), inspection_summary(values), *refusals)


def calibrate(
    model: given.Model,
    output: given.Folder,
    target_lazy_ratio: given.LazyRatio = None,
    target_compute_ratio: given.ComputeRatio = None,
    objective: Annotated[str, typer.Option(help="rollout needs only a sampler; paper needs --data.")] = "rollout",
    iterations: Annotated[int | None, typer.Option(min=0, help="Optimiser steps; 0 keeps the plan.")] = None,
    trajectories: Annotated[
        int | None, typer.Option(min=1, help="Of one optimiser step; processes that were launched together share them.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the gates.")] = None,
    knots: Annotated[
        int | None, typer.Option(help="Rows of the gate table, interpolated; by default one per step.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="Function that returns an iterable of StepPair.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File to resume from, written as training goes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it costs.")] = False,
    sampler: given.Sampler = None,
    scheduler: given.Scheduler = "ddim",
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Denoising steps; 20 in the default sampler. Repeat it to serve several numbers."),
    ] = None,
    shape: given.Shapes = None,
    options: given.Options = None,
    seed: given.Seed = 0,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> None:
    """Learn when each branch may reuse, until a target share is saved. The model's weights stay as they are.

    Gates fit the number of steps that they were calibrated with: --steps 20 --steps 30 makes some that serve both.

    Several processes share the work: accelerate launch --multi_gpu --num_processes 2 -m lazy_compile calibrate ...
    """
    from lazy_compile.calibration import calibrator as calibration
    from lazy_compile.cli.models import find_function, load_lazy, load_model, load_sampler
    from lazy_compile.policies.gate_table import GateTable
    from lazy_compile.policies.policy import Learned
    from lazy_compile.processes import launched_processes, local_device
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import facts, plain, show

    chosen: dict[str, Any] = {
        "target_lazy_ratio": target_lazy_ratio, "target_compute_ratio": target_compute_ratio, "objective": objective,
        "iterations": iterations, "trajectories": trajectories, "learning_rate": learning_rate, "knots": knots,
        "seed": seed,
    }  # fmt: skip
    config = calibration.CalibrationConfig(**{name: value for name, value in chosen.items() if value is not None})
    pairs = None if data is None else find_function(data)()
    named = load_model(model, shape or (), local_device(device))
    lazy = load_lazy(named, None, options or ())
    numbers: list[int | None] = [*dict.fromkeys(steps)] if steps else [None]
    samples = [load_sampler(sampler, named, lazy, number, scheduler) for number in numbers]
    if dry_run:
        work = [calibration_work(lazy, sample, config) for sample in samples]
        values = work[0] if len(work) == 1 else {"calibrations": work}
        show(values, json, f"would calibrate {len(lazy.branches)} branches and write {output}", *map(facts, work))
        return
    reports = []
    with launched_processes() as processes, progress_bars(processes.is_first and not json) as on_progress:
        for number, sample in zip(numbers, samples, strict=True):
            file = checkpoint
            if checkpoint is not None and len(numbers) > 1:
                file = checkpoint.with_name(f"{checkpoint.stem}-{number}{checkpoint.suffix}")
            report = calibration.calibrate(
                lazy, config, sample=sample, data=pairs, checkpoint=file, on_progress=on_progress
            )
            reports.append(report)
    if not processes.is_first:
        return
    if len(reports) > 1:
        lazy.policy = Learned(GateTable.joined([report.table for report in reports]))
    lazy.save(output)
    results = [
        ({} if number is None else {"steps": number})
        | {key: value for key, value in plain(report).items() if key not in ("table", "trained", "history")}
        | {"output": str(output)}
        for number, report in zip(numbers, reports, strict=True)
    ]
    show(results[0] if len(results) == 1 else {"calibrations": results}, json, *map(facts, results))


def plan(
    model: given.Model,
    output: given.Folder,
    lazy_ratio: given.LazyRatio = None,
    compute_ratio: given.ComputeRatio = None,
    latency_ratio: Annotated[float | None, typer.Option(help="Time to spend over that of the dense model.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Root mean square change of the samples that may be caused.")
    ] = None,
    timings: Annotated[
        Path | None,
        typer.Option(help="JSON with the seconds of each branch and of a step, for --latency-ratio."),
    ] = None,
    schedule_file: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Take a schedule: ours, SmoothCache's, routers, a steps_mask."),
    ] = None,
    freeze: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Take what the gates in this folder decide for most samples.")
    ] = None,
    sampler: given.Sampler = None,
    scheduler: given.Scheduler = "ddim",
    steps: given.Steps = None,
    shape: given.Shapes = None,
    options: given.Options = None,
    seed: given.Seed = 0,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> None:
    """Find the fixed schedule that changes the samples least under a budget, or take one from elsewhere."""
    from lazy_compile.cli.models import load_lazy, load_model, load_sampler
    from lazy_compile.planning import import_schedule as schedule_io
    from lazy_compile.planning import planner as planning
    from lazy_compile.planning.timings import BranchTimings
    from lazy_compile.policies.policy import Scheduled
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import facts, reuse_picture, show
    from lazy_compile.runtime.sampling import count_steps

    if timings is not None and latency_ratio is None:
        raise ConfigError("--timings count for a --latency-ratio only; give one")
    if schedule_file is not None and freeze is not None:
        raise ConfigError("--import and --freeze both give a schedule; give one of them")
    ready = schedule_file is not None or freeze is not None
    budget = None if ready else planning.Budget(lazy_ratio, compute_ratio, latency_ratio, error)
    named = load_model(model, shape or (), device)
    lazy = load_lazy(named, freeze, options or ())
    sample = load_sampler(sampler, named, lazy, steps, scheduler)
    if schedule_file is not None:
        schedule = schedule_io.import_schedule(schedule_file, lazy.branches, count_steps(lazy, sample, seed))
    elif budget is None:
        sample(lazy, seed)
        schedule = schedule_io.freeze(lazy.stats)
    else:
        with progress_bars(not json) as on_progress:
            seconds = None if timings is None else BranchTimings.load(timings)
            schedule = planning.plan(lazy, sample, budget, timings=seconds, seed=seed, on_progress=on_progress)
    lazy.policy = Scheduled(schedule)
    lazy.save(output)
    values = {
        "steps": schedule.steps,
        "lazy_ratio": schedule.lazy_ratio,
        "compute_ratio": schedule.compute_ratio([branch.macs for branch in lazy.branches], lazy.graph.total_macs),
        "output": str(output),
    }
    show(
        values | {"should_compute": schedule.to_json()["should_compute"]},
        json,
        reuse_picture([branch.name for branch in lazy.branches], (~schedule.should_compute).astype(float).tolist()),
        facts(values),
    )


def export(
    model: given.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The ONNX file to write; with --gating schedule a folder.")
    ],
    target: Annotated[
        Literal["onnx", "ort-mobile"],
        typer.Option(help="ort-mobile writes the .ort format of ONNX Runtime's builds for phones."),
    ] = "onnx",
    gates: given.Gates = None,
    gating: given.GatingOption = "predicate",
    group: given.Group = None,
    invariant: given.Invariants = None,
    precision: given.Precision = None,
    simplify: Annotated[
        bool, typer.Option("--simplify", help="Also run onnxsim; dropped if it moves a branch.")
    ] = False,
    shape: given.Shapes = None,
    options: given.Options = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> None:
    """Write an ONNX model in which every branch is an If node, with its caches as inputs and outputs."""
    from lazy_compile.backends.onnx.export import export_onnx
    from lazy_compile.backends.onnx.prologue import prologue_path
    from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
    from lazy_compile.cli.models import in_precision, load_lazy, load_model, parse_group, require_inputs
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import facts, plain, show

    mobile = target == "ort-mobile"
    if mobile and (gating == "schedule" or output.suffix != ".ort"):
        raise ConfigError(
            f"--target ort-mobile writes one .ort file; seen --output {output} and --gating {gating}: "
            "name it model.ort, with --gating predicate or input"
        )
    grouped = parse_group(group)
    named = in_precision(load_model(model, shape or (), device), precision)
    lazy = load_lazy(named, gates, options or ())
    with progress_bars(not json) as on_progress, tempfile.TemporaryDirectory() as folder:
        report = export_onnx(
            lazy, Path(folder) / "model.onnx" if mobile else output, require_inputs(named), gating=gating,
            group=grouped, invariants=tuple(invariant or ()), simplify=simplify, on_progress=on_progress,
        )  # fmt: skip
        if mobile:
            size, beside = convert_to_ort(report.path, output), report.prologue and prologue_path(output, gating)
            report = replace(report, bytes=size, path=output, prologue=beside)
    values = plain(report)
    show(values, json, facts(values))


def calibration_work(lazy: LazyModule, sample: SampleFunction, config: Any) -> dict[str, Any]:
    """How many evaluations of the model each stage of a calibration takes."""
    from lazy_compile.calibration.trainer import SHIFTS
    from lazy_compile.planning.search import SearchOptions
    from lazy_compile.runtime.sampling import count_steps

    steps, branches = count_steps(lazy, sample, config.seed), len(lazy.branches)
    tables = 2 if config.iterations else 1
    work = {
        "searching a schedule (at most)": SearchOptions().trajectories * steps,
        "training gates": config.iterations * config.trajectories * (2 * steps if config.objective == "rollout" else 3),
        "setting the ratio (at most)": tables * (SHIFTS + 1) * steps,
    }
    return {"branches": branches, "steps": steps, **work, "evaluations (at most)": sum(work.values())}


def _graph_after(lazy: LazyModule, wanted: str) -> str:
    from lazy_compile import pipelines
    from lazy_compile.ir.pass_manager import PassManager
    from lazy_compile.passes.lift_cache_slots import LiftCacheSlots

    lifting = pipelines.lifting(LiftCacheSlots(lazy.lazy_config.reuse))
    before = (*pipelines.gating(lazy.lazy_config).passes, *lifting.passes)
    lowering, scheduled = pipelines.lowering(), pipelines.scheduled([True] * len(lazy.branches))
    after = scheduled if wanted in {item.name for item in scheduled.passes[:1]} else lowering
    pipeline = PassManager([*before, *after.passes])
    names = dict.fromkeys(item.name for item in (*before, *lowering.passes, *scheduled.passes))
    if wanted not in names:
        raise ConfigError(f"--after {wanted}: there is no such pass; the passes are {', '.join(names)}")
    return str(pipeline.run(lazy.graph.captured.program, until=wanted).graph)
