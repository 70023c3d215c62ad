"""Questions about lazy diffusion that a table of methods does not answer, asked of the digits model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.bench.quality import rmse
from lazy_compile.bench.rows import RowFile
from lazy_compile.bench.tasks.registry import Subject
from lazy_compile.calibration.calibrator import CalibrationConfig, CalibrationReport, calibrate
from lazy_compile.calibration.initial_gates import gate_start, initial_gates
from lazy_compile.compiler import transform
from lazy_compile.ir.branch import BranchKind
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.import_schedule import freeze
from lazy_compile.planning.linear_model import flips_of
from lazy_compile.planning.planner import plan
from lazy_compile.planning.sample_response import cauchy_weights, dense_samples, measure_response
from lazy_compile.planning.search import SearchOptions
from lazy_compile.policies.gate_table import GateTable, pool
from lazy_compile.policies.learned import Learned
from lazy_compile.policies.policy import GateQuery, Policy, Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.sampling import Sampler

Floats = npt.NDArray[np.float64]

FIRST_SEED = 9_200_001
"""Far from the seeds that plans and gates are made from."""


@dataclass(frozen=True)
class QuestionSettings:
    """How much is measured.

    Attributes:
        steps: denoising steps T where nothing else is said.
        seeds, samples: sets of noise, and images for each.
        batch: images per trajectory while schedules are searched for and gates trained.
        numbers_of_steps: T for the comparison with fewer steps.
        lazy_ratios: shares of reuse for that.
        transfers: T at which gates calibrated for ``steps`` are used.
        regression_seeds: sets of noise from which the worth of a decision is predicted.
        gate_seeds: times that a plan is made and gates are trained from it, each on other noise.
        gate_ratios: shares of the MACs at which that is done.
        search: of schedules.
    """

    steps: int = 20
    seeds: int = 2
    samples: int = 48
    batch: int = 24
    numbers_of_steps: tuple[int, ...] = (50, 20, 10, 8, 4)
    lazy_ratios: tuple[float, ...] = (0.1, 0.3, 0.5)
    transfers: tuple[int, ...] = (12, 20, 30)
    regression_seeds: int = 6
    gate_seeds: int = 3
    gate_ratios: tuple[float, ...] = (0.7, 0.5, 0.35)
    search: SearchOptions = field(default_factory=lambda: SearchOptions(rounds=2))
    quick_search: SearchOptions = field(default_factory=lambda: SearchOptions(rounds=0))


@dataclass(frozen=True)
class Answer:
    """A question, and what came out: a list of records."""

    question: str
    records: list[Any]


@dataclass
class Questions:
    """One subject.

    Attributes:
        subject: what is asked.
        settings: how much is measured.
        on_progress: see :mod:`lazy_compile.progress`.
        kept: a file that holds each answer as soon as it is there, and that a stopped run goes on from.
    """

    subject: Subject
    settings: QuestionSettings
    on_progress: OnProgress = no_progress
    kept: Path | None = None

    def __post_init__(self) -> None:
        self.lazy = transform(self.subject.model, self.subject.example)
        self.macs = [branch.macs for branch in self.lazy.branches]
        self._dense: dict[int, list[Tensor]] = {}

    def answers(self) -> dict[str, Any]:
        """Every question and its records; ``schedule`` is what the plan at half the compute decides."""
        asked: dict[str, Callable[[], Iterator[Any]]] = {
            "schedule": lambda: iter(self._planned[0].should_compute.astype(int).tolist()),
            "seconds": lambda: iter([{"planning": self._planned[1], "training gates": self._trained[1]}]),
            "thresholds": lambda: self.thresholds(self._trained[0]),
            "kinds": self.kinds,
            "frozen": lambda: self.frozen(self._trained[0]),
            "worth": lambda: self.worth(self._planned[0]),
            "gates": self.gates,
            "steps": self.fewer_steps,
            "transfers": lambda: self.transfers(self._planned[0]),
        }
        identity = json.loads(json.dumps({**asdict(self.settings), "torch": torch.__version__}))
        file = RowFile(self.kept, Answer, ("question",), identity)
        answers: dict[str, Any] = {}
        for done, (name, ask) in enumerate(asked.items()):
            self.on_progress("asking", done, len(asked), name)
            answers[name] = file.get(lambda: Answer(name, list(ask())), question=name).records  # noqa: B023
        return answers | {"branches": self._names(), "seconds": answers["seconds"][0]}

    @cached_property
    def _planned(self) -> tuple[CacheSchedule, float]:
        """The plan at half the compute, and the processor time that it took."""
        started = time.process_time()
        schedule = self._plan(self.settings.steps, Budget(compute_ratio=0.5), self.settings.search)
        return schedule, time.process_time() - started

    @cached_property
    def _trained(self) -> tuple[CalibrationReport, float]:
        """Gates that start from that plan, and the processor time that they took."""
        schedule, _ = self._planned
        started = time.process_time()
        return self._gates(schedule), time.process_time() - started

    # Questions ----------------------------------------------------------------------------------------------------

    def thresholds(self, report: CalibrationReport) -> Iterator[dict[str, Any]]:
        """The paper reuses where ``sigmoid(-compute_logit)`` is above 0.5; what other thresholds do."""
        for threshold in np.linspace(0.3, 0.7, 9):
            shift = math.log(threshold / (1 - threshold))
            yield {"threshold": float(threshold), **self._score(Learned(report.trained, shift))}

    def kinds(self) -> Iterator[dict[str, Any]]:
        """Every second and third step, for attention alone, MLPs alone, and both."""
        mlp = np.array([branch.kind is BranchKind.MLP for branch in self.lazy.branches])
        for n in (2, 3):
            table = CacheSchedule.every(n, self.settings.steps, len(mlp)).should_compute
            for name, lazy_ones in (("attention", ~mlp), ("MLP", mlp), ("both", mlp | True)):
                yield {"n": n, "lazy": name, **self._score(Scheduled(CacheSchedule(table | ~lazy_ones)))}

    def frozen(self, report: CalibrationReport) -> Iterator[dict[str, Any]]:
        """Gates that decide for each sample, what they mostly decide, and the plan that they start from."""
        self.lazy.policy = Learned(report.trained)
        self._sampler(self.settings.steps, self.settings.samples)(self.lazy, FIRST_SEED - 1)
        varying = self.lazy.stats.decisions_varying_between_samples
        majority = freeze(self.lazy.stats).should_compute
        slopes = report.trained.slope
        table = CacheSchedule(majority, None if slopes is None else slopes.double().numpy())
        yield {"decisions": "of trained gates", "varying": varying, **self._score(Learned(report.trained))}
        yield {"decisions": "their majority", "varying": 0.0, **self._score(Scheduled(table))}

    def worth(self, schedule: CacheSchedule) -> Iterator[dict[str, Any]]:
        """How well the worth of a decision to a sample can be predicted from what its gate reads.

        For each decision, what turning it over changes in the error of each sample (to first order) is regressed on the
        leading principal components of the pooled input; R2 is taken on samples that were left out, against the mean.
        """
        features, worth, trusted = self._worth(schedule)
        for components in (1, 2, 6):
            missed = plain = 0.0
            for place, change in worth.items():
                for fold in range(4):
                    out = np.arange(len(change)) % 4 == fold
                    predicted, mean = _regress(features[place], change, trusted, out, components)
                    missed += float((trusted[out] * (change[out] - predicted) ** 2).sum())
                    plain += float((trusted[out] * (change[out] - mean) ** 2).sum())
            spread = np.mean([change.std() / abs(change.mean()) for change in worth.values()])
            yield {
                "components": components, "r2": 1 - missed / plain, "samples": len(trusted), "variation": float(spread),
            }  # fmt: skip

    def gates(self) -> Iterator[dict[str, Any]]:
        """Calibrations, and the plans that they start from, on noise that neither has seen."""
        for ratio, number in product(self.settings.gate_ratios, range(self.settings.gate_seeds)):
            seed = 1000 * number
            schedule = self._plan(self.settings.steps, Budget(compute_ratio=ratio), self.settings.search, seed)
            report = self._gates(schedule, seed, ratio)
            trained, planned = self._score(Learned(report.trained)), self._score(Scheduled(schedule))
            yield {
                "budget": ratio, "seed": seed, "kept": report.kept,
                "ratio_planned": planned["compute_ratio"], "rmse_planned": planned["rmse"],
                "ratio_trained": trained["compute_ratio"], "rmse_trained": trained["rmse"],
            }  # fmt: skip

    def fewer_steps(self) -> Iterator[dict[str, Any]]:
        """Lazy trajectories of T steps against dense ones of fewer, which spend no less."""
        for steps in self.settings.numbers_of_steps:
            for ratio in self.settings.lazy_ratios:
                schedule = self._plan(steps, Budget(lazy_ratio=ratio), self.settings.quick_search)
                ours = self._score(Scheduled(schedule), steps)
                fewer = math.ceil(ours["compute_ratio"] * steps)
                pairs = zip(self.dense(fewer), self.dense(steps), strict=True)
                by_steps = float(np.mean([rmse(left, right) for left, right in pairs]))
                yield {
                    "steps": steps,
                    "lazy_ratio": schedule.lazy_ratio,
                    **ours,
                    "fewer": fewer,
                    "rmse_fewer": by_steps,
                }

    def transfers(self, schedule: CacheSchedule) -> Iterator[dict[str, Any]]:
        """Plans made for each T; one table of gates from all of these plans; and gates on knots over the noise level,
        from ``schedule`` alone."""
        budget = Budget(compute_ratio=0.5)
        plans = {steps: self._plan(steps, budget, self.settings.search) for steps in self.settings.transfers}
        joined = Learned(GateTable.joined([self._gates_of(plan, steps, None) for steps, plan in plans.items()]))
        knots = self._gates_of(schedule, self.settings.steps, self.settings.steps)
        for steps, planned in plans.items():
            own, together = self._score(Scheduled(planned), steps), self._score(joined, steps)
            low, high = -5.0, 5.0
            for _ in range(9):
                middle = (low + high) / 2
                moved = self._score(Learned(knots, middle), steps, seeds=1)
                low, high = (middle, high) if moved["compute_ratio"] < own["compute_ratio"] else (low, middle)
            moved = self._score(Learned(knots, high), steps)
            yield {
                "steps": steps, "rmse_own": own["rmse"], "ratio_own": own["compute_ratio"],
                "rmse_joined": together["rmse"], "ratio_joined": together["compute_ratio"],
                "rmse_moved": moved["rmse"], "ratio_moved": moved["compute_ratio"],
            }  # fmt: skip

    def _gates_of(self, schedule: CacheSchedule, steps: int, knots: int | None) -> GateTable:
        """Gates that repeat a schedule."""
        sampler = self._sampler(steps, self.settings.batch)
        start = gate_start(self.lazy, Budget(compute_ratio=0.5), sampler, schedule, 0, no_progress)
        return initial_gates(self.lazy, start, knots)

    # Running ------------------------------------------------------------------------------------------------------

    def dense(self, steps: int) -> list[Tensor]:
        if steps not in self._dense:
            sampler = self._sampler(steps, self.settings.samples)
            self._dense[steps] = [dense_samples(self.lazy, sampler, seed) for seed in self._seeds()]
        return self._dense[steps]

    def _score(self, policy: Policy, steps: int | None = None, seeds: int | None = None) -> dict[str, float]:
        steps = steps or self.settings.steps
        sampler, dense = self._sampler(steps, self.settings.samples), self.dense(steps)
        self.lazy.policy = policy
        with torch.no_grad():
            errors = [rmse(sampler(self.lazy, seed), dense[place]) for place, seed in enumerate(self._seeds()[:seeds])]
        stats = self.lazy.stats
        return {"rmse": float(np.mean(errors)), "compute_ratio": stats.compute_ratio, "reused": stats.lazy_ratio}

    def _seeds(self) -> Sequence[int]:
        return range(FIRST_SEED, FIRST_SEED + self.settings.seeds)

    def _sampler(self, steps: int, samples: int) -> Sampler:
        return self.subject.sampler(steps, samples)

    def _plan(self, steps: int, budget: Budget, search: SearchOptions, seed: int = 0) -> CacheSchedule:
        sampler = self._sampler(steps, self.settings.batch)
        return plan(self.lazy, sampler, budget, options=search, seed=seed, on_progress=self.on_progress)

    def _gates(self, schedule: CacheSchedule, seed: int = 0, ratio: float = 0.5) -> CalibrationReport:
        sampler = self._sampler(self.settings.steps, self.settings.batch)
        config = CalibrationConfig(target_compute_ratio=ratio, seed=seed)
        return calibrate(self.lazy, config, sample=sampler, plan=schedule, on_progress=self.on_progress)

    def _names(self) -> list[str]:
        return [branch.name for branch in self.lazy.branches]

    def _worth(
        self, schedule: CacheSchedule
    ) -> tuple[dict[tuple[int, int], Floats], dict[tuple[int, int], Floats], Floats]:
        """By step and branch ``float64[N, F]`` that its gate reads and ``float64[N]`` that turning it over changes; how
        far each of the N samples is trusted."""
        sampler, rows = self._sampler(self.settings.steps, self.settings.batch), self.settings.batch
        read: dict[tuple[int, int], list[Floats]] = {}
        changes, errors = [], []
        for seed in range(self.settings.regression_seeds):
            watching = _Watching(schedule)
            self.lazy.policy = watching
            sampler(self.lazy, seed)
            for place, pooled in watching.read.items():
                by_sample = pooled.reshape(-1, rows, pooled.shape[-1]).transpose(1, 0, 2)
                read.setdefault(place, []).append(by_sample.reshape(rows, -1))
            response = measure_response(self.lazy, sampler, schedule, seed=seed, directions=2)
            flips = flips_of(replace(response, weight=None))
            change = 2 * flips * response.error + flips**2
            changes.append(change.reshape(*change.shape[:2], -1, rows).mean(axis=2))
            errors.append((response.error**2).reshape(-1, rows).mean(axis=0))
        worth = np.concatenate(changes, axis=2)
        places = {place: np.concatenate(pooled) for place, pooled in read.items()}
        return places, {place: worth[place] for place in places}, cauchy_weights(np.concatenate(errors))


class _Watching(Scheduled):
    """A schedule that notes what every gate would read."""

    def __init__(self, schedule: CacheSchedule) -> None:
        super().__init__(schedule)
        object.__setattr__(self, "read", {})

    read: dict[tuple[int, int], Floats]

    def should_compute(self, query: GateQuery) -> bool | Tensor:
        self.read[query.step, query.branch.index] = pool(query.branch, query.entries).double().numpy()
        return super().should_compute(query)


def _regress(
    features: Floats, change: Floats, trusted: Floats, out: npt.NDArray[np.bool_], components: int
) -> tuple[Floats, float]:
    """What a ridge regression foretells of the samples that are left out, and the mean of the others."""
    kept = ~out
    centred = features - features[kept].mean(axis=0)
    _, size, axes = np.linalg.svd(centred[kept], full_matrices=False)
    leading = centred @ (axes[:components].T / np.maximum(size[:components], 1e-12)) * np.sqrt(kept.sum())
    mean = float(np.average(change[kept], weights=trusted[kept]))
    design = leading[kept] * trusted[kept, None]
    gram = design.T @ leading[kept] + trusted[kept].sum() * np.eye(components)
    return mean + leading[out] @ np.linalg.solve(gram, design.T @ (change[kept] - mean)), mean
