"""The whole story on scanned digits: inspect, calibrate, compare with doing less in other ways, export, run."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import lazy_compile
from lazy_compile.calibration import CalibrationConfig, calibrate
from lazy_compile.cli_tables import branch_table, inspection, inspection_summary
from lazy_compile.demo import digits
from lazy_compile.demo.contest import FIRST_EVALUATION_SEED, Contest, DemoSettings
from lazy_compile.module import LazyModule
from lazy_compile.planning import Budget, plan
from lazy_compile.policy import Policy, Scheduled
from lazy_compile.progress import OnProgress, progress_bars
from lazy_compile.report import SAMPLES, SUMMARY, write_report
from lazy_compile.schedule import CacheSchedule
from lazy_compile.storage import atomic_path, save_json
from lazy_compile.threads import one_thread

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
    folder = checkpoints or default_checkpoints()
    model = digits.load_or_train_digits_dit(folder / "digits_dit.safetensors", progress=progress)
    classifier = digits.load_or_train_digits_classifier(folder / "digits_classifier.safetensors")
    lazy = lazy_compile.transform(model, example_inputs())
    seen = inspection("digits DiT", lazy)
    console.print(branch_table(seen), inspection_summary(seen), sep="\n")
    with progress_bars(progress) as on_progress:
        plans = plan_targets(lazy, settings, on_progress)
        gates = calibrate_targets(lazy, settings, plans, output, on_progress)
        contest = Contest(settings, model, lazy, classifier, on_progress)
        compete(contest, gates, plans)
        onnx = follow_in_onnx_runtime(lazy, gates[max(settings.targets)], settings, output / ONNX, on_progress)
    summary = {
        "model": f"digits DiT ({type(model).__name__}, {len(lazy.branches)} branches, "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters)",
        "steps": settings.steps,
        "rows": contest.summary_rows(),
        "decisions_varying_between_samples": contest.result("lazy", max(settings.targets)).varying,
        "onnx": onnx,
    }
    save_json(output / SUMMARY, summary)
    _save_samples(output / SAMPLES, contest, [branch.name for branch in lazy.branches])
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


def compete(contest: Contest, gates: Mapping[float, Policy], plans: Mapping[float, CacheSchedule]) -> None:
    """Every method in turn. What is random or planned has the target of the gates; fewer steps get no less compute."""
    steps, branches = contest.settings.steps, len(contest.lazy.branches)
    sets = contest.settings.seeds
    contest.dense(steps, "dense")
    every_other = [Scheduled(CacheSchedule.every(2, steps, branches))] * sets
    contest.lazily(every_other, "fora2")
    with options(contest.lazy, reuse="last"):
        contest.lazily(every_other, "fora2_last")
    for target, policy in sorted(gates.items()):
        ours = contest.lazily([policy] * sets, "lazy", target)
        drawn = [CacheSchedule.random(ours.lazy_ratio, steps, branches, seed) for seed in range(sets)]
        contest.lazily([Scheduled(schedule) for schedule in drawn], "random", target)
        contest.lazily([Scheduled(plans[target])] * sets, "planned", target)
        contest.dense(math.ceil(ours.compute_ratio * steps), "ddim", target)


def follow_in_onnx_runtime(
    lazy: LazyModule, policy: Policy, settings: DemoSettings, path: Path, on_progress: OnProgress
) -> dict[str, Any]:
    """Export, and run one trajectory in ONNX Runtime and in PyTorch under one decision per call."""
    from lazy_compile.backends.denoiser import EngineDenoiser
    from lazy_compile.backends.onnx import export_onnx
    from lazy_compile.backends.onnxruntime import OnnxRunner

    sampler = settings.sampler(batch=4)
    with options(lazy, batch_rule="all_reuse"):
        exported = export_onnx(lazy, path, example_inputs(rows=2 * sampler.batch), on_progress=on_progress)
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


def default_checkpoints() -> Path:
    """``examples/digits`` of a source tree, else a folder of the user's cache."""
    examples = Path(lazy_compile.__file__).parents[1] / "examples" / "digits"
    if examples.is_dir():
        return examples
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazy_compile"


def example_inputs(rows: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(rows, 1, 8, 8),
        "timestep": torch.full((rows,), 500),
        "class_labels": torch.zeros(rows, dtype=torch.long),
        "return_dict": False,
    }


def _save_samples(path: Path, contest: Contest, branches: Sequence[str]) -> None:
    """What the report draws: the first images of the first set, and who reused when, by row of the summary."""
    arrays: dict[str, Any] = {"branches": np.array(branches), "reference": contest.reference[0][:SHOWN].numpy()}
    for position, result in enumerate(contest.results):
        arrays[f"images_{position}"] = result.images[0][:SHOWN].numpy()
        if result.reuse is not None:
            arrays[f"reuse_{position}"] = result.reuse
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
