"""How much quality reuse costs: methods at equal compute, from the same noise, scored alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lazy_compile.bench.rows import RowFile
from lazy_compile.bench.tasks.digits import frechet_distance
from lazy_compile.bench.tasks.registry import Subject
from lazy_compile.calibration.calibrator import CalibrationConfig, calibrate
from lazy_compile.compiler import transform
from lazy_compile.config import ReuseArm
from lazy_compile.planning import baselines
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.import_schedule import freeze
from lazy_compile.planning.linear_model import swap
from lazy_compile.planning.planner import plan
from lazy_compile.planning.sample_response import measure_response
from lazy_compile.planning.search import SearchOptions
from lazy_compile.policies.learned import Learned
from lazy_compile.policies.policy import GateQuery, Policy, Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler

Family = Literal["dense", "baseline", "planned", "learned", "oracle"]
Run = Callable[[int], tuple[Tensor, float]]
"""``seed -> (samples, compute_ratio)``."""

ORACLE_DIRECTIONS = 8
"""What the oracle knows of each sample."""

FIRST_SAMPLING_SEED = 9_100_001
"""Far from the seeds that calibration draws its noise from."""


@dataclass(frozen=True)
class QualitySettings:
    """How much is measured.

    Attributes:
        steps: denoising steps T.
        ratios: compute ratios at which methods that can be tuned are compared.
        sampling_seeds: sets of noise that every method starts from.
        calibration_seeds: times that what is calibrated is calibrated, each on other noise.
        samples: images per set of noise.
        calibration_batch: images per trajectory while a schedule is searched for.
        plan_calls: of the model, for a search without gradient; None searches with one.
        threshold_batch: images on which the threshold of a rule is chosen.
        learned: whether gates are trained and the oracle is asked; both need gradients through a trajectory.
        gate_batch: images per trajectory while gates are trained.
        oracle_samples: images for which the oracle is asked.
        reference_steps: of the dense trajectory that stands for the exact solution.
        search: of planning.
    """

    steps: int = 20
    ratios: tuple[float, ...] = (0.7, 0.5, 0.35)
    sampling_seeds: int = 3
    calibration_seeds: int = 2
    samples: int = 64
    calibration_batch: int = 128
    plan_calls: int | None = None
    threshold_batch: int = 8
    learned: bool = True
    gate_batch: int = 6
    oracle_samples: int = 12
    reference_steps: int = 100
    search: SearchOptions = field(default_factory=lambda: SearchOptions(rounds=4))


@dataclass(frozen=True)
class Method:
    """One way of spending less.

    Attributes:
        name, family, reuse_arm, steps, budget: as in the table.
        runs: how it samples, as often as it is calibrated; that begins when this is called.
    """

    name: str
    family: Family
    reuse_arm: str
    runs: Callable[[], Sequence[Run]]
    steps: int
    budget: float | None = None


@dataclass(frozen=True)
class QualityRow:
    """A row of the table, and its place among the methods of its subject."""

    place: int
    method: str
    row: dict[str, Any]


def measure(
    subject: Subject,
    settings: QualitySettings,
    folder: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> list[dict[str, Any]]:
    """One row for each method and budget.

    Args:
        subject: what is measured.
        settings: how much.
        folder: rows and searches are kept there as soon as they are there, and not made again.
        on_progress: see :mod:`lazy_compile.progress`.
    """
    quality = Quality(subject, settings, folder, on_progress)
    identity = json.loads(json.dumps({**asdict(settings), "torch": torch.__version__}))
    kept = RowFile(folder and folder / "rows.json", QualityRow, ("place", "method"), identity)
    methods = list(quality.methods())
    for place, method in enumerate(methods):
        on_progress(f"scoring methods, {subject.name}", place, len(methods), method.name)
        kept.get(lambda: QualityRow(place, method.name, quality.row(method)), place=place, method=method.name)  # noqa: B023
    on_progress(f"scoring methods, {subject.name}", len(methods), len(methods), "")
    return [each.row for each in sorted(kept.rows, key=lambda each: each.place)]


@dataclass(frozen=True)
class Noise:
    """Sets of noise, and what the original makes of them: what every method is held against."""

    seeds: Sequence[int]
    dense: Sequence[Tensor]
    reference: Sequence[Tensor]

    @classmethod
    def of(cls, subject: Subject, settings: QualitySettings, seeds: Sequence[int], samples: int) -> Noise:
        def images(steps: int) -> list[Tensor]:
            sampler = subject.sampler(steps, samples)
            return [sampler(subject.model, seed) for seed in seeds]  # type: ignore[arg-type]

        return cls(seeds, images(settings.steps), images(settings.reference_steps))


@dataclass(frozen=True)
class PerSample(Policy):
    """A schedule for each sample; rows of one sample are as many apart as there are samples."""

    schedules: Sequence[CacheSchedule]

    def should_compute(self, query: GateQuery) -> Tensor:
        decided = [bool(schedule.should_compute[query.step, query.branch.index]) for schedule in self.schedules]
        return torch.tensor(decided).repeat(query.entries[0].shape[0] // len(decided))

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        return Scheduled(self.schedules[0]).slopes(step, timestep, before)


class Quality:
    """One subject, and what every method is held against."""

    def __init__(
        self, subject: Subject, settings: QualitySettings, folder: Path | None, on_progress: OnProgress
    ) -> None:
        self.subject, self.settings, self.folder, self.on_progress = subject, settings, folder, on_progress
        self.seeds = [FIRST_SAMPLING_SEED + position for position in range(settings.sampling_seeds)]
        self.lazy = transform(subject.model, subject.example)
        self.branches = len(self.lazy.branches)
        self.macs = [branch.macs for branch in self.lazy.branches]

    @cached_property
    def noise(self) -> Noise:
        return Noise.of(self.subject, self.settings, self.seeds, self.settings.samples)

    @cached_property
    def little_noise(self) -> Noise:
        return Noise.of(self.subject, self.settings, self.seeds[:1], self.settings.oracle_samples)

    @cached_property
    def _changes(self) -> baselines.Floats:
        return baselines.measure_changes(self.lazy, self.calibration_sampler, seed=0)

    def methods(self) -> Iterator[Method]:
        steps = self.settings.steps
        yield Method("dense", "dense", "", lambda: [self._original(steps)], steps)
        for fewer in sorted({math.ceil(ratio * steps) for ratio in self.settings.ratios}, reverse=True):
            yield self._by_steps("fewer steps", fewer)
            yield self._by_steps("DPM-Solver++ 2M", fewer, self.subject.second_order(fewer, self.settings.samples))
        for n in (2, 3, 4):
            yield from self._fixed(f"FORA n={n}", CacheSchedule.every(n, steps, self.branches))
        for ratio in self.settings.ratios:
            yield from self._at(ratio)

    def _by_steps(self, name: str, steps: int, sampler: Sampler | None = None) -> Method:
        return Method(name, "baseline", "", lambda: [self._original(steps, sampler)], steps)

    def _at(self, ratio: float) -> Iterator[Method]:
        """Methods tuned to a compute ratio. A rule in whole steps takes the next larger one, never less."""
        settings = self.settings
        share = sum(self.macs) / self.lazy.graph.total_macs
        count = math.ceil((ratio - 1 + share) / share * settings.steps - 1e-9)
        yield from self._fixed("evenly spread", CacheSchedule.evenly(count, settings.steps, self.branches))
        drawn = [CacheSchedule.random((1 - ratio) / share, settings.steps, self.branches, seed) for seed in (0, 1)]
        yield self._lazily("random", "baseline", "linear", lambda: [Scheduled(schedule) for schedule in drawn])
        for name, rule in (
            ("SmoothCache", lambda bound: Scheduled(baselines.smoothcache_schedule(self._changes, bound))),
            ("TeaCache", baselines.AccumulatedChange),
            ("First-Block-Cache", baselines.FirstBlockChange),
        ):
            yield from self._both_arms(name, cache(lambda rule=rule: self._tuned(ratio, rule)))

        def plans(slopes: bool) -> list[Policy]:
            made = [self._plan(ratio, seed) for seed in range(settings.calibration_seeds)]
            return [Scheduled(each if slopes else CacheSchedule(each.should_compute)) for each in made]

        yield replace(self._lazily("plan", "planned", "fitted", lambda: plans(True)), budget=ratio)
        yield self._lazily("plan without slopes", "planned", "linear", lambda: plans(False))
        if settings.learned:
            yield replace(self._lazily("gates", "learned", "fitted", lambda: [self._gates(ratio)]), budget=ratio)
            yield self._lazily("gates, frozen majority", "learned", "fitted", lambda: [self._frozen(ratio)])
            yield self._oracle_row("oracle for each sample", ratio, lambda: self._oracle(ratio))
            yield self._oracle_row("plan, where the oracle was asked", ratio, lambda: Scheduled(self._plan(ratio, 0)))

    @cache  # noqa: B019
    def _plan(self, ratio: float, seed: int) -> CacheSchedule:
        return plan(
            self.lazy, self.calibration_sampler, Budget(compute_ratio=ratio), options=self.settings.search,
            calls=self.settings.plan_calls, seed=1000 * seed, on_progress=self.on_progress,
            checkpoint=self.folder and self.folder / f"plan-{ratio}-{seed}",
        )  # fmt: skip

    @cache  # noqa: B019
    def _gates(self, ratio: float) -> Policy:
        """Trained gates, whether or not they are better than their plan."""
        report = calibrate(
            self.lazy, CalibrationConfig(target_compute_ratio=ratio), plan=self._plan(ratio, 0),
            sample=self.subject.sampler(self.settings.steps, self.settings.gate_batch), on_progress=self.on_progress,
            checkpoint=self.folder and self.folder / f"gates-{ratio}",
        )  # fmt: skip
        return Learned(report.trained)

    def _frozen(self, ratio: float) -> Policy:
        """What these gates decide for most samples."""
        self.lazy.policy = self._gates(ratio)
        self.calibration_sampler(self.lazy, FIRST_SAMPLING_SEED - 1)
        return Scheduled(CacheSchedule(freeze(self.lazy.stats).should_compute, self._plan(ratio, 0).slopes))

    def _oracle_row(self, name: str, ratio: float, policy: Callable[[], Policy]) -> Method:
        sampler = self.subject.sampler(self.settings.steps, self.settings.oracle_samples)

        def runs() -> list[Run]:
            return [self._lazy_run(policy(), "linear", sampler)]

        return Method(name, "oracle", "fitted", runs, self.settings.steps, ratio)

    def _oracle(self, ratio: float) -> Policy:
        """The first-order answer of every sample is known, and a schedule searched for each of them alone."""
        schedule = self._plan(ratio, 0)
        samples, steps = self.settings.oracle_samples, self.settings.steps
        sampler = self.subject.sampler(steps, samples)
        (seed,) = self.little_noise.seeds
        response = measure_response(self.lazy, sampler, schedule, seed=seed, directions=ORACLE_DIRECTIONS)
        budget = Budget(compute_ratio=ratio)
        cost = budget.cost_of(np.array(self.macs, dtype=np.float64), float(self.lazy.graph.total_macs))
        spend = budget.spend(steps, cost) + 1e-9
        return PerSample([swap(response.of_sample(row, samples), schedule, cost, spend, 60) for row in range(samples)])

    def _fixed(self, name: str, schedule: CacheSchedule) -> Iterator[Method]:
        yield from self._both_arms(name, lambda: Scheduled(schedule))
        ratio = schedule.compute_ratio(self.macs, self.lazy.graph.total_macs)

        def second_order(seed: int) -> tuple[Tensor, float]:
            return baselines.taylor_samples(self.lazy, self.sampler, schedule, 2, seed), ratio

        yield Method(f"{name}, TaylorSeer", "baseline", "quadratic", lambda: [second_order], self.settings.steps)

    def _both_arms(self, name: str, policy: Callable[[], Policy]) -> Iterator[Method]:
        for arm in ("last", "linear"):
            yield self._lazily(name, "baseline", arm, lambda: [policy()])

    def _lazily(self, name: str, family: Family, arm: str, policies: Callable[[], Sequence[Policy]]) -> Method:
        reuse: ReuseArm = "last" if arm == "last" else "linear"
        return Method(
            name, family, arm, lambda: [self._lazy_run(policy, reuse) for policy in policies()], self.settings.steps
        )

    # Running ------------------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> Callable[[LazyModule, int], Tensor]:
        return self.subject.sampler(self.settings.steps, self.settings.samples)

    @property
    def calibration_sampler(self) -> Callable[[LazyModule, int], Tensor]:
        return self.subject.sampler(self.settings.steps, self.settings.calibration_batch)

    @property
    def _threshold_sampler(self) -> Callable[[LazyModule, int], Tensor]:
        return self.subject.sampler(self.settings.steps, self.settings.threshold_batch)

    def _original(self, steps: int, sampler: Sampler | None = None) -> Run:
        sampler = sampler or self.subject.sampler(steps, self.settings.samples)
        ratio = steps / self.settings.steps
        return lambda seed: (sampler(self.subject.model, seed), ratio)  # type: ignore[arg-type]

    def _lazy_run(self, policy: Policy, reuse: ReuseArm, sampler: Sampler | None = None) -> Run:
        return lambda seed: self._under(policy, reuse, sampler or self.sampler, seed)

    def _under(
        self, policy: Policy, reuse: ReuseArm, sampler: Callable[[LazyModule, int], Tensor], seed: int
    ) -> tuple[Tensor, float]:
        self.lazy.lazy_config = replace(self.lazy.lazy_config, reuse=reuse)
        self.lazy.policy = policy
        samples, ratio = sampler(self.lazy, seed), self.lazy.stats.compute_ratio
        self.lazy.lazy_config = replace(self.lazy.lazy_config, reuse="linear")
        return samples, ratio

    def _tuned(self, ratio: float, policy_of: Callable[[float], Policy]) -> Policy:
        """The rule at the largest threshold that spends at least ``ratio`` on calibration noise."""
        low, high = 1e-4, 10.0
        for _ in range(12):
            middle = math.sqrt(low * high)
            spent = self._under(policy_of(middle), "linear", self._threshold_sampler, 0)[1]
            low, high = (middle, high) if spent >= ratio else (low, middle)
        return policy_of(low)

    # Scoring ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def row(self, method: Method) -> dict[str, Any]:
        noise = self.little_noise if method.family == "oracle" else self.noise
        scores = [
            self._scores(noise, place, *run(seed)) for run in method.runs() for place, seed in enumerate(noise.seeds)
        ]
        means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
        return {
            "model": self.subject.name,
            "sampler": self.subject.sampler_name,
            "steps": method.steps,
            "method": method.name,
            "family": method.family,
            "reuse_arm": method.reuse_arm,
            "budget": method.budget,
            **means,
            "spread": float(np.std([score["rmse_dense"] for score in scores])),
            "seeds": len(scores),
        }

    def _scores(self, noise: Noise, place: int, images: Tensor, compute_ratio: float) -> dict[str, float]:
        against = scores(self.subject, images, noise.dense[place], noise.reference[place])
        return {"compute_ratio": compute_ratio, **against}


@torch.no_grad()
def scores(subject: Subject, images: Tensor, dense: Tensor, reference: Tensor) -> dict[str, float]:
    """What is measured of one sampling batch: against the dense images from the same noise, in a range of 2; against a
    reference; and what the judge of the subject says."""
    to_dense = rmse(images, dense)
    return {
        "rmse_dense": to_dense,
        "median_dense": float((images - dense).square().flatten(1).mean(1).sqrt().median()),
        "psnr": 20 * math.log10(2 / max(to_dense, 1e-9)),
        "ssim": ssim(images, dense),
        "rmse_reference": rmse(images, reference),
        "frechet": frechet_distance(subject.features(images), subject.features(reference)),
        "accuracy": subject.accuracy(images),
        **subject.scores(images, dense),
    }


def rmse(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).square().mean().sqrt())


def ssim(left: Tensor, right: Tensor, window: int = 5) -> float:
    """Mean structural similarity of images in [-1, 1] over a uniform window (Wang et al., 2004)."""
    first, second = left.double() + 1, right.double() + 1

    def mean(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, window, stride=1)

    mean_a, mean_b = mean(first), mean(second)
    variance_a, variance_b = mean(first**2) - mean_a**2, mean(second**2) - mean_b**2
    covariance = mean(first * second) - mean_a * mean_b
    steady, contrast = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    alike = (2 * mean_a * mean_b + steady) / (mean_a**2 + mean_b**2 + steady)
    return float((alike * (2 * covariance + contrast) / (variance_a + variance_b + contrast)).mean())
