"""The whole story on scanned digits: inspect, calibrate, compare with doing less in other ways, export, run.

Digits, since planning, training gates and an export take minutes there; to look at, pictures of the emoji model under
a schedule that was planned before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lazy_compile.bench.pictures import Strip, lazy_model, strips
from lazy_compile.bench.tasks import digits
from lazy_compile.bench.tasks.digits import example_inputs
from lazy_compile.bench.tasks.registry import Subject, emoji_subject
from lazy_compile.bench.tasks.training import default_checkpoints
from lazy_compile.bench.timing import one_thread
from lazy_compile.calibration.calibrator import CalibrationConfig, calibrate
from lazy_compile.compiler import transform
from lazy_compile.demo.comparison import FIRST_EVALUATION_SEED, Comparison, DemoSettings
from lazy_compile.errors import ArtifactError
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import plan
from lazy_compile.policies.policy import Policy, Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, progress_bars
from lazy_compile.reporting.html_report import SAMPLES, SUMMARY, write_report
from lazy_compile.reporting.terminal_tables import branch_table, inspection, inspection_summary
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import atomic_path, save_sealed_json

ONNX = "digits.onnx"
SHOWN = 20
"""Samples of each method that the report shows."""


def run_demo(
    output: Path, settings: DemoSettings | None = None, *, checkpoints: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Run everything, and write ``summary.json``, ``report.html``, the gates and the ONNX model.

    Args:
        output: the folder to write to.
        settings: how much is measured.
        checkpoints: folder of the trained digits model and classifier; they are trained where they are missing.
        progress: bars and remarks on standard error.

    Returns:
        What ``summary.json`` holds.
    """
    with one_thread():
        return _run(output, settings or DemoSettings(), checkpoints, progress)


def _run(output: Path, settings: DemoSettings, checkpoints: Path | None, progress: bool) -> dict[str, Any]:
    console = Console(stderr=True, quiet=not progress, highlight=False, width=None if sys.stderr.isatty() else 140)
    folder = checkpoints or default_checkpoints("digits")
    model = digits.load_or_train_digits_dit(folder / "digits_dit.safetensors", progress=progress)
    classifier = digits.load_or_train_digits_classifier(folder / "digits_classifier.safetensors")
    lazy = transform(model, example_inputs())
    seen = inspection("digits DiT", lazy)
    console.print(branch_table(seen), inspection_summary(seen), sep="\n")
    with progress_bars(progress) as on_progress:
        plans = plan_targets(lazy, settings, on_progress)
        gates = calibrate_targets(lazy, settings, plans, output, on_progress)
        comparison = Comparison(settings, model, lazy, classifier, on_progress)
        compare_methods(comparison, gates, plans)
        onnx = follow_in_onnx_runtime(lazy, gates[max(settings.targets)], settings, output / ONNX, on_progress)
        drawn, pictures = draw_pictures(settings.pictures, console, on_progress)
    summary = {
        "model": f"digits DiT ({type(model).__name__}, {len(lazy.branches)} branches, "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters)",
        "steps": settings.steps,
        "rows": comparison.summary_rows(),
        "decisions_varying_between_samples": comparison.result("lazy", max(settings.targets)).varying,
        "onnx": onnx,
        "pictures": pictures,
    }
    save_sealed_json(output / SUMMARY, summary)
    _save_samples(output / SAMPLES, comparison, [branch.name for branch in lazy.branches], drawn)
    write_report(output / SUMMARY, output / "report.html")
    return summary


def plan_targets(lazy: LazyModule, settings: DemoSettings, on_progress: OnProgress) -> dict[float, CacheSchedule]:
    """A schedule for each target."""
    sampler = settings.sampler(settings.plan_batch)
    return {
        target: plan(lazy, sampler, Budget(lazy_ratio=target), options=settings.search, on_progress=on_progress)
        for target in settings.targets
    }


def calibrate_targets(
    lazy: LazyModule,
    settings: DemoSettings,
    plans: Mapping[float, CacheSchedule],
    output: Path,
    on_progress: OnProgress,
) -> dict[float, Policy]:
    """Gates for each target, saved under ``gates-<target>``."""
    sampler = settings.sampler(settings.calibration_batch)
    policies = {}
    for target in settings.targets:
        config = CalibrationConfig(target_lazy_ratio=target)
        if settings.iterations is not None:
            config = replace(config, iterations=settings.iterations)

        def report(stage: str, done: int, total: int, note: str = "", target: float = target) -> None:
            on_progress(f"{stage}, target {target:.0%}", done, total, note)

        calibrate(lazy, config, sample=sampler, plan=plans[target], on_progress=report)
        lazy.save(output / f"gates-{target}")
        policies[target] = lazy.policy
    return policies


def compare_methods(
    comparison: Comparison, gates: Mapping[float, Policy], plans: Mapping[float, CacheSchedule]
) -> None:
    """Every method in turn. What is random or planned has the target of the gates; fewer steps get no less compute."""
    steps, branches = comparison.settings.steps, len(comparison.lazy.branches)
    sets = comparison.settings.seeds
    comparison.dense(steps, "dense")
    every_other = [Scheduled(CacheSchedule.every(2, steps, branches))] * sets
    comparison.lazily(every_other, "fora2")
    with options(comparison.lazy, reuse="last"):
        comparison.lazily(every_other, "fora2_last")
    for target, policy in sorted(gates.items()):
        ours = comparison.lazily([policy] * sets, "lazy", target)
        drawn = [CacheSchedule.random(ours.lazy_ratio, steps, branches, seed) for seed in range(sets)]
        comparison.lazily([Scheduled(schedule) for schedule in drawn], "random", target)
        comparison.lazily([Scheduled(plans[target])] * sets, "planned", target)
        comparison.dense(math.ceil(ours.compute_ratio * steps), "ddim", target)


def follow_in_onnx_runtime(
    lazy: LazyModule, policy: Policy, settings: DemoSettings, path: Path, on_progress: OnProgress
) -> dict[str, Any]:
    """Export, and run one trajectory in ONNX Runtime and in PyTorch under one decision per call."""
    from lazy_compile.backends.denoiser import EngineDenoiser
    from lazy_compile.backends.onnx.export import export_onnx
    from lazy_compile.backends.onnxruntime.runner import OnnxRunner

    sampler = settings.sampler(batch=4)
    with options(lazy, batch_rule="all_reuse"):
        exported = export_onnx(
            lazy, path, example_inputs(rows=2 * sampler.batch), dynamic=False, on_progress=on_progress
        )
        denoiser = EngineDenoiser(OnnxRunner(path), policy, lazy.lazy_config)
        lazy.policy = policy
        there, here = sampler(denoiser, FIRST_EVALUATION_SEED), sampler(lazy, FIRST_EVALUATION_SEED)
        differing = np.count_nonzero(denoiser.stats.reuse_table != lazy.stats.reuse_table)
    return {
        "branches": exported.branches,
        "if_nodes": exported.if_nodes,
        "heavy_ops_outside_if": len(exported.heavy_ops_outside_if),
        "max_abs_error": float((there - here).abs().max()),
        "lazy_ratio": denoiser.stats.lazy_ratio,
        "decisions_that_differ": int(differing),
    }


def draw_pictures(
    images: int, console: Console, on_progress: OnProgress, subject: Subject | None = None
) -> tuple[list[Strip], dict[str, Any] | None]:
    """Emoji: dense, under the schedule for half the compute, in fewer steps. Nothing where weights are missing."""
    if not images:
        return [], None
    try:
        subject = subject or emoji_subject()
        schedule = CacheSchedule.load(default_checkpoints("emoji") / "schedules" / "50.json")
    except ArtifactError as error:
        console.print(f"no pictures of emoji: {error}")
        return [], None
    drawn = strips(subject, lazy_model(subject), {0.5: schedule}, images, on_progress)
    rows = [strip.record() for strip in drawn]
    return drawn, {"model": subject.name, "captions": list(subject.captions(images)), "rows": rows}


@contextmanager
def options(lazy: LazyModule, **changes: Any) -> Iterator[None]:
    """Within this context the model has other run-time options; its graph does not depend on them."""
    config = lazy.lazy_config
    lazy.lazy_config = replace(config, **changes)
    try:
        yield
    finally:
        lazy.lazy_config = config
        lazy.reset()


def _save_samples(path: Path, comparison: Comparison, branches: Sequence[str], drawn: Sequence[Strip]) -> None:
    """What the report draws: by row of the summary the first images of the first set and who reused when; pictures."""
    arrays: dict[str, Any] = {"branches": np.array(branches), "reference": comparison.reference[0][:SHOWN].numpy()}
    for position, result in enumerate(comparison.results):
        arrays[f"images_{position}"] = result.images[0][:SHOWN].numpy()
        if result.reuse is not None:
            arrays[f"reuse_{position}"] = result.reuse
    for position, strip in enumerate(drawn):
        arrays[f"picture_{position}"] = strip.images.numpy()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
