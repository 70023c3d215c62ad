"""The verbs that run and judge what was made: run, verify, report, bench speed, bench quality, demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazy_compile.cli import options as given
from lazy_compile.errors import ConfigError

if TYPE_CHECKING:
    from lazy_compile.backends.runner import Runner

Onnx = Annotated[Path | None, typer.Option(help="The ONNX file that export wrote for this model.")]


def run(
    model: given.Model,
    gates: given.Gates = None,
    onnx: Onnx = None,
    engine: Annotated[
        Path | None, typer.Option(help="The engine that build wrote for this model; needs a GPU.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .npy file for the samples.")] = None,
    sampler: given.Sampler = None,
    scheduler: given.Scheduler = "ddim",
    steps: given.Steps = None,
    seed: given.Seed = 0,
    shape: given.Shapes = None,
    options: given.Options = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> None:
    """Sample one trajectory, in PyTorch, in ONNX Runtime (--onnx) or in TensorRT (--engine), and say what was saved.

    Of several processes that accelerate launch has started, each takes the next seed; the first writes all samples.
    """
    import numpy as np
    import torch

    from lazy_compile.cli.models import load_lazy, load_model, load_sampler
    from lazy_compile.processes import launched_processes, local_device
    from lazy_compile.reporting.tables import facts, reuse_picture, show, size
    from lazy_compile.storage import atomic_path

    runner = _runner(onnx, engine)
    named = load_model(model, shape or (), local_device(device))
    lazy = load_lazy(named, gates, options or ())
    sample = load_sampler(sampler, named, lazy, steps, scheduler)
    denoiser: Any = lazy
    if runner is not None:
        from lazy_compile.backends.denoiser import EngineDenoiser, check_same_model

        check_same_model(runner.metadata, lazy.original, onnx or engine)
        denoiser = EngineDenoiser(runner, None if gates is None else lazy.policy, lazy.lazy_config)
    denoiser.reset_stats()
    with launched_processes() as processes:
        start = time.perf_counter()
        with torch.no_grad():
            samples = sample(denoiser, seed + processes.rank)
        seconds = time.perf_counter() - start
        stats = denoiser.stats
        samples = processes.gather(samples)
        stats.reused, stats.evaluated = processes.sum(torch.tensor(np.stack([stats.reused, stats.evaluated]))).numpy()
    if not processes.is_first:
        return
    values = {
        "runtime": "PyTorch" if runner is None else "ONNX Runtime" if engine is None else "TensorRT",
        "policy": type(denoiser.policy).__name__,
        "steps": len(stats.evaluated),
        "seconds": seconds,
        "lazy_ratio": stats.lazy_ratio,
        "compute_ratio": stats.compute_ratio,
        "decisions_varying_between_samples": stats.decisions_varying_between_samples,
        "cache": size(lazy.cache_bytes if runner is None else sum(stream.bytes for stream in runner.streams)),
        "samples": "x".join(map(str, samples.shape)),
    }
    if output is not None:
        with atomic_path(output) as temporary, temporary.open("wb") as file:
            np.save(file, samples.float().cpu().numpy())
        values["output"] = str(output)
    show(
        values | {"reuse": stats.reuse_table.tolist()},
        json,
        reuse_picture([branch.name for branch in lazy.branches], stats.reuse_table.tolist()),
        facts(values),
    )


def _runner(onnx: Path | None, engine: Path | None) -> Runner | None:
    from lazy_compile.backends.open import open_runner

    if onnx is not None and engine is not None:
        raise ConfigError("--onnx and --engine exclude each other: give the one to run")
    path = onnx or engine
    return None if path is None else open_runner(path)


def verify(
    model: given.Model,
    gates: given.Gates = None,
    onnx: Onnx = None,
    sampler: given.Sampler = None,
    scheduler: given.Scheduler = "ddim",
    steps: given.Steps = None,
    seed: given.Seed = 0,
    shape: given.Shapes = None,
    options: given.Options = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> None:
    """Hold a lazy model against its original: bitwise while all compute, a random schedule, the exported model."""
    from lazy_compile.cli.models import load_lazy, load_model, load_sampler
    from lazy_compile.reporting.tables import check_table, plain, show
    from lazy_compile.verification import compare

    named = load_model(model, shape or (), device)
    lazy = load_lazy(named, gates, options or ())
    comparison = compare(lazy, load_sampler(sampler, named, lazy, steps, scheduler), onnx=onnx, seed=seed)
    checks = [plain(check) for check in comparison.checks]
    show({"model": model, "passed": comparison.passed, "checks": checks}, json, check_table(comparison))
    comparison.require()


def report(
    source: Annotated[Path, typer.Argument(help="A summary.json, or a folder that calibrate or plan wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    json: given.Json = False,
) -> None:
    """Write a self-contained HTML page about a comparison, or about calibrated gates."""
    from lazy_compile.reporting.page import write_report
    from lazy_compile.reporting.tables import facts, show

    values = {"source": str(source), "output": str(write_report(source, output))}
    show(values, json, facts(values))


def speed(output: given.Folder = Path("build/bench"), json: given.Json = False) -> None:
    """Time gated models against dense ones, side by side, and write bench.json."""
    from lazy_compile.bench.speed import run as measure
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import plain, show, speed_table

    with progress_bars(not json) as on_progress:
        rows = [plain(row) for row in measure(output, on_progress=on_progress)]
    show({"rows": rows, "output": str(output)}, json, speed_table(rows), f"written to {output}")


def quality(
    model: Annotated[str, typer.Argument(help="digits or scenes, or all.")] = "all",
    output: given.Folder = Path("build/quality"),
    samples: Annotated[int | None, typer.Option(min=2, help="Images for each set of noise.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Compute ratios; may be given several times.")] = None,
    json: given.Json = False,
) -> None:
    """Score methods of doing less at equal compute, and write quality.json, quality.md and quality.html."""
    from lazy_compile.bench.quality_report import measure_all, quality_table
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import show

    given_settings = {"samples": samples, "ratios": tuple(ratio or ()) or None}
    changes = {name: value for name, value in given_settings.items() if value is not None}
    with progress_bars(not json) as on_progress:
        rows = measure_all(model, changes, output, on_progress)
    show({"rows": rows, "output": str(output)}, json, quality_table(rows), f"written to {output}")


def questions(output: given.Folder = Path("build/quality"), json: given.Json = False) -> None:
    """Ask the digits model what a table of methods does not say, and write questions.md with its pictures."""
    from lazy_compile.bench.ablations_report import ask_all
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import show

    with progress_bars(not json) as on_progress:
        answers = ask_all(output, on_progress=on_progress)
    show({"answers": answers, "output": str(output)}, json, f"written to {output}")


def demo(output: given.Folder = Path("build/demo"), json: given.Json = False) -> None:
    """The whole story on scanned digits: inspect, calibrate, compare with fewer steps, export, run. Takes minutes."""
    from lazy_compile.demo.run import run_demo
    from lazy_compile.reporting.tables import facts, result_table, show

    summary = run_demo(output, progress=not json)
    written = {"report": output / "report.html", "summary": output / "summary.json"}
    show(summary, json, result_table(summary), facts(written))
