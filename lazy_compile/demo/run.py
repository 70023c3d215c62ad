"""The whole story on scanned digits: inspect, calibrate, compare with doing less in other ways, export, run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import lazy_compile
from lazy_compile.calibration import CalibrationConfig, calibrate
from lazy_compile.cli_tables import branch_table, inspection, inspection_summary
from lazy_compile.demo import digits
from lazy_compile.module import LazyModule
from lazy_compile.planning import Budget, plan
from lazy_compile.policy import Policy, Scheduled
from lazy_compile.progress import OnProgress, progress_bars
from lazy_compile.report import SAMPLES, SUMMARY, write_report
from lazy_compile.schedule import CacheSchedule
from lazy_compile.storage import atomic_path, save_json

FIRST_EVALUATION_SEED = 7_000_001
"""Far from the seeds that calibration draws its noise from."""

SHOWN = 20
"""Samples of each method that the report shows."""


@dataclass(frozen=True)
class DemoSettings:
    """How much is measured.

    Attributes:
        steps: denoising steps T.
        targets: lazy ratios that gates are calibrated for.
        seeds: how many sets of noise every method starts from.
        samples: images per set.
        reference_steps: of the dense trajectory that stands for the exact solution.
        calibration_batch: images per trajectory in calibration.
        iterations: training iterations of the gates; None takes the library's default.
    """

    steps: int = 20
    targets: tuple[float, ...] = (0.3, 0.5)
    seeds: int = 3
    samples: int = 256
    reference_steps: int = 100
    calibration_batch: int = 32
    iterations: int | None = None


@dataclass(frozen=True)
class Measured:
    """One method on every set of noise."""

    method: str
    sampler_steps: int
    lazy_ratio: float
    compute_ratio: float
    images: Sequence[Tensor]
    target: float | None = None
    reuse: np.ndarray[Any, np.dtype[np.float64]] | None = None
    varying: float = 0.0


@dataclass
class Contest:
    """Runs methods from the same noise and scores them alike."""

    settings: DemoSettings
    model: Any
    lazy: LazyModule
    classifier: digits.DigitsClassifier
    on_progress: OnProgress
    results: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        self.seeds = [FIRST_EVALUATION_SEED + position for position in range(settings.seeds)]
        self.rows = 6 + 5 * len(settings.targets) - 2
        self.reference = self._sample(self.model, settings.reference_steps, "reference")
        images, _ = digits.load_digits_tensor()
        with torch.no_grad():
            self.real = self.classifier.features(images)

    def dense(self, steps: int, method: str, target: float | None = None) -> Measured:
        """The original model, at full or at fewer steps."""
        images = self._sample(self.model, steps, method)
        return self._add(Measured(method, steps, 0.0, steps / self.settings.steps, images, target))

    def lazily(
        self, policy: Policy, method: str, target: float | None = None, lazy: LazyModule | None = None
    ) -> Measured:
        """A lazy model under a policy."""
        lazy = lazy or self.lazy
        lazy.policy = policy
        lazy.reset_stats()
        images = self._sample(lazy, self.settings.steps, method)
        stats = lazy.stats
        return self._add(
            Measured(
                method, self.settings.steps, stats.lazy_ratio, stats.compute_ratio, images, target, stats.reuse_table,
                stats.decisions_varying_between_samples,
            )
        )  # fmt: skip

    def summary_rows(self) -> list[dict[str, Any]]:
        dense = next(result for result in self.results if result.method == "dense").images
        return [self._scores(result, dense) for result in self.results]

    def _sample(self, denoiser: Callable[..., Any], steps: int, note: str) -> list[Tensor]:
        sampler = digits.DigitsSampler(steps=steps, batch=self.settings.samples)
        images = [sampler(denoiser, seed) for seed in self.seeds]
        self.on_progress("sampling", len(self.results), self.rows, note)
        return images

    def _add(self, result: Measured) -> Measured:
        self.results.append(result)
        self.on_progress("sampling", len(self.results), self.rows, result.method)
        return result

    def _scores(self, result: Measured, dense: Sequence[Tensor]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "method": result.method,
            "target": result.target,
            "sampler_steps": result.sampler_steps,
            "lazy_ratio": result.lazy_ratio,
            "compute_ratio": result.compute_ratio,
        }
        with torch.no_grad():
            features = [self.classifier.features(images) for images in result.images]
        scores = {
            "rmse_dense": [_rmse(a, b) for a, b in zip(result.images, dense, strict=True)],
            "rmse_reference": [_rmse(a, b) for a, b in zip(result.images, self.reference, strict=True)],
            "frechet": [digits.frechet_distance(seen, self.real) for seen in features],
        }
        for name, values in scores.items():
            row[name] = float(np.mean(values))
            row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return row | {"seeds": len(self.seeds)}


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
    settings = settings or DemoSettings()
    console = Console(stderr=True, quiet=not progress, highlight=False)
    folder = checkpoints or default_checkpoints()
    model = digits.load_or_train_digits_dit(folder / "digits_dit.safetensors", progress=progress)
    classifier = digits.load_or_train_digits_classifier(folder / "digits_classifier.safetensors")
    example = example_inputs()
    lazy = lazy_compile.transform(model, example)
    seen = inspection("digits DiT", lazy)
    console.print(branch_table(seen), inspection_summary(seen), sep="\n")
    with progress_bars(progress) as on_progress:
        gates = calibrate_targets(lazy, settings, output, on_progress)
        contest = Contest(settings, model, lazy, classifier, on_progress)
        compete(contest, gates, example)
    largest = max(settings.targets)
    onnx = compare_onnx(model, example, gates[largest], lazy.config, settings.steps, output / "digits.onnx")
    summary = {
        "model": f"digits DiT ({type(model).__name__}, {len(lazy.branches)} branches, "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters)",
        "steps": settings.steps,
        "rows": contest.summary_rows(),
        "decisions_varying_between_samples": contest.results[-1].varying,
        "onnx": onnx,
    }
    save_json(output / SUMMARY, summary)
    _save_samples(output / SAMPLES, contest, [branch.name for branch in lazy.branches])
    write_report(output / SUMMARY, output / "report.html")
    return summary


def calibrate_targets(
    lazy: LazyModule, settings: DemoSettings, output: Path, on_progress: OnProgress
) -> dict[float, Policy]:
    """Gates for each target, saved under ``gates-<target>``."""
    sampler = digits.DigitsSampler(steps=settings.steps, batch=settings.calibration_batch)
    policies = {}
    for target in settings.targets:
        config = CalibrationConfig(target_lazy_ratio=target)
        if settings.iterations is not None:
            config = replace(config, iterations=settings.iterations)

        def report(stage: str, done: int, total: int, note: str = "", target: float = target) -> None:
            on_progress(f"{target:.0%}: {stage}", done, total, note)

        calibrate(lazy, config, sample=sampler, on_progress=report)
        lazy.save(output / f"gates-{target}")
        policies[target] = lazy.policy
    return policies


def compete(contest: Contest, gates: Mapping[float, Policy], example: dict[str, Any]) -> None:
    """Every method in turn; the last is the lazy model at the largest target."""
    settings, lazy = contest.settings, contest.lazy
    steps, branches = settings.steps, len(lazy.branches)
    sampler = digits.DigitsSampler(steps=steps, batch=settings.calibration_batch)
    contest.dense(steps, "dense")
    every_other = Scheduled(CacheSchedule.every(2, steps, branches))
    contest.lazily(every_other, "fora2")
    repeating = lazy_compile.transform(contest.model, example, reuse="last")
    contest.lazily(every_other, "fora2_last", lazy=repeating)
    for target, policy in sorted(gates.items()):
        drawn = CacheSchedule.random(target, steps, branches, seed=0)
        contest.lazily(Scheduled(drawn), "random", target)
        planned = plan(lazy, sampler, Budget(lazy_ratio=target), on_progress=contest.on_progress)
        contest.lazily(Scheduled(planned), "planned", target)
        ours = contest.lazily(policy, "lazy", target)
        contest.results.remove(ours)
        contest.dense(math.ceil(ours.compute_ratio * steps), "ddim", target)
        contest.results.append(ours)


def default_checkpoints() -> Path:
    """``examples/digits`` of a source tree, else a folder of the user's cache."""
    examples = Path(lazy_compile.__file__).parents[1] / "examples" / "digits"
    if examples.is_dir():
        return examples
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazy_compile"


def example_inputs(batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(batch, 1, 8, 8),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.zeros(batch, dtype=torch.long),
        "return_dict": False,
    }


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def _save_samples(path: Path, contest: Contest, branches: Sequence[str]) -> None:
    """What the report draws: the first images of the first set, and who reused when, by row of the summary."""
    arrays: dict[str, Any] = {"branches": np.array(branches), "reference": contest.reference[0][:SHOWN].numpy()}
    for position, result in enumerate(contest.results):
        arrays[f"images_{position}"] = result.images[0][:SHOWN].numpy()
        if result.reuse is not None:
            arrays[f"reuse_{position}"] = result.reuse
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
