"""``lazy-compile calibrate``: gates learned until a target share is saved."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import ModelOptions, SamplerOptions

if TYPE_CHECKING:
    from lazy_compile.runtime.module import LazyModule
    from lazy_compile.runtime.sampling import Sampler as SampleFunction


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(SamplerOptions, ModelOptions):
    """What ``lazy-compile calibrate`` takes."""

    output: given.Folder
    target_lazy_ratio: given.LazyRatio = None
    target_compute_ratio: given.ComputeRatio = None
    objective: Annotated[str, typer.Option(help="rollout needs only a sampler; paper needs --data.")] = "rollout"
    iterations: Annotated[int | None, typer.Option(min=0, help="Optimiser steps; 0 keeps the plan.")] = None
    trajectories: Annotated[
        int | None, typer.Option(min=1, help="Of one optimiser step; processes that were launched together share them.")
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of the gates.")] = None
    knots: Annotated[
        int | None, typer.Option(help="Rows of the gate table, interpolated; by default one per step.")
    ] = None
    data: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="Function that returns an iterable of StepPair.")
    ] = None
    checkpoint: Annotated[Path | None, typer.Option(help="File to resume from, written as training goes.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it costs.")] = False
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Denoising steps; 20 in the default sampler. Repeat it to serve several numbers."),
    ] = None


def calibrate(options: CalibrateOptions) -> None:
    """Learn when each branch may reuse, until a target share is saved. The model's weights stay as they are.

    Gates fit the number of steps that they were calibrated with: --steps 20 --steps 30 makes some that serve both.

    Several processes share the work: accelerate launch --multi_gpu --num_processes 2 -m lazy_compile calibrate ...
    """
    from lazy_compile.calibration import calibrator as calibration
    from lazy_compile.cli.models import find_function, load_lazy, load_model, load_sampler
    from lazy_compile.policies.gate_table import GateTable
    from lazy_compile.policies.learned import Learned
    from lazy_compile.processes import launched_processes, local_device
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import facts, plain, show

    shared = {item.name for item in fields(calibration.CalibrationConfig)}
    chosen = {item.name: getattr(options, item.name) for item in fields(options) if item.name in shared}
    config = calibration.CalibrationConfig(**{name: value for name, value in chosen.items() if value is not None})
    pairs = None if options.data is None else find_function(options.data)()
    named = load_model(options.model, options.shape or (), local_device(options.device))
    lazy = load_lazy(named, None, options.settings or (), options.capture_cache)
    numbers: list[int | None] = [*dict.fromkeys(options.steps)] if options.steps else [None]
    samples = [load_sampler(options.sampler, named, lazy, number, options.scheduler) for number in numbers]
    if options.dry_run:
        work = [calibration_work(lazy, sample, config) for sample in samples]
        values = work[0] if len(work) == 1 else {"calibrations": work}
        show(
            values,
            options.json,
            f"would calibrate {len(lazy.branches)} branches and write {options.output}",
            *map(facts, work),
        )
        return
    reports = []
    with launched_processes() as processes, progress_bars(processes.is_first and not options.json) as on_progress:
        for number, sample in zip(numbers, samples, strict=True):
            file = options.checkpoint
            if options.checkpoint is not None and len(numbers) > 1:
                file = options.checkpoint.with_name(f"{options.checkpoint.stem}-{number}{options.checkpoint.suffix}")
            report = calibration.calibrate(
                lazy, config, sample=sample, data=pairs, checkpoint=file, on_progress=on_progress
            )
            reports.append(report)
    if not processes.is_first:
        return
    if len(reports) > 1:
        lazy.policy = Learned(GateTable.joined([report.table for report in reports]))
    lazy.save(options.output)
    results = [
        ({} if number is None else {"steps": number})
        | {key: value for key, value in plain(report).items() if key not in ("table", "trained", "history")}
        | {"output": str(options.output)}
        for number, report in zip(numbers, reports, strict=True)
    ]
    show(results[0] if len(results) == 1 else {"calibrations": results}, options.json, *map(facts, results))


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
