"""Methods of doing less, run from the same noise and scored alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.bench.tasks import digits
from lazy_compile.bench.tasks.training import Classifier
from lazy_compile.planning.search import SearchOptions
from lazy_compile.policies.policy import Policy
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.module import LazyModule

FIRST_EVALUATION_SEED = 9_100_001
"""Far from the seeds that calibration draws its noise from."""


@dataclass(frozen=True)
class DemoSettings:
    """How much is measured.

    Attributes:
        steps: denoising steps T.
        targets: lazy ratios that gates are calibrated for.
        seeds: how many sets of noise every method starts from.
        samples: images per set.
        reference_steps: of the dense trajectory that stands for the exact solution.
        plan_batch: images per trajectory while schedules are searched for.
        search: how long that takes.
        calibration_batch: images per trajectory while gates are trained.
        iterations: training iterations of the gates; None takes the library's default.
        pictures: images of the emoji model, under the schedule that lies beside its weights.
    """

    steps: int = 20
    targets: tuple[float, ...] = (0.3, 0.5)
    seeds: int = 3
    samples: int = 128
    reference_steps: int = 100
    plan_batch: int = 24
    search: SearchOptions = field(default_factory=lambda: SearchOptions(rounds=3))
    calibration_batch: int = 16
    iterations: int | None = None
    pictures: int = 8

    def sampler(self, batch: int, steps: int | None = None) -> digits.DigitsSampler:
        return digits.DigitsSampler(steps=steps or self.steps, batch=batch)


@dataclass(frozen=True)
class Measured:
    """One method on every set of noise."""

    method: str
    sampler_steps: int
    lazy_ratio: float
    compute_ratio: float
    images: Sequence[Tensor]
    target: float | None = None
    reuse: npt.NDArray[np.float64] | None = None
    varying: float = 0.0


@dataclass
class Comparison:
    """Runs methods from the same noise and scores them alike."""

    settings: DemoSettings
    model: Any
    lazy: LazyModule
    classifier: Classifier
    on_progress: OnProgress
    results: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        self.seeds = [FIRST_EVALUATION_SEED + position for position in range(settings.seeds)]
        self.methods = 3 + 4 * len(settings.targets)
        self._announce("reference")
        self.reference = self._dense_samples(settings.reference_steps)
        scans, _ = digits.load_digits_tensor()
        with torch.no_grad():
            self.reference_features = [self.classifier.features(images) for images in self.reference]
            self.scan_features = self.classifier.features(scans)

    def dense(self, steps: int, method: str, target: float | None = None) -> Measured:
        """The original model, at full or at fewer steps."""
        self._announce(method)
        images = self._dense_samples(steps)
        return self._add(Measured(method, steps, 0.0, steps / self.settings.steps, images, target))

    def lazily(self, policies: Sequence[Policy], method: str, target: float | None = None) -> Measured:
        """The lazy model under one policy for each set of noise."""
        sampler = self.settings.sampler(self.settings.samples)
        self._announce(method)
        images, stats = [], []
        for policy, seed in zip(policies, self.seeds, strict=True):
            self.lazy.policy = policy
            self.lazy.reset_stats()
            images.append(sampler(self.lazy, seed))
            stats.append(self.lazy.stats)
        return self._add(
            Measured(
                method,
                self.settings.steps,
                float(np.mean([one.lazy_ratio for one in stats])),
                float(np.mean([one.compute_ratio for one in stats])),
                images,
                target,
                np.mean([one.reuse_table for one in stats], axis=0),
                float(np.mean([one.decisions_varying_between_samples for one in stats])),
            )
        )

    def result(self, method: str, target: float | None = None) -> Measured:
        return next(result for result in self.results if (result.method, result.target) == (method, target))

    def summary_rows(self) -> list[dict[str, Any]]:
        dense = self.result("dense").images
        return [self._scores(result, dense) for result in self.results]

    def _dense_samples(self, steps: int) -> list[Tensor]:
        sampler = self.settings.sampler(self.settings.samples, steps)
        return [sampler(self.model, seed) for seed in self.seeds]

    def _announce(self, method: str) -> None:
        self.on_progress("sampling", len(self.results), self.methods, method)

    def _add(self, result: Measured) -> Measured:
        self.results.append(result)
        self._announce(result.method)
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
            "frechet": [digits.frechet_distance(*pair) for pair in zip(features, self.reference_features, strict=True)],
            "frechet_scans": [digits.frechet_distance(seen, self.scan_features) for seen in features],
        }
        for name, values in scores.items():
            row[name] = float(np.mean(values))
            row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return row | {"seeds": len(self.seeds)}


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())
