"""Calibration: the target, what is trained and what is not, checkpoints, and bad input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, Learned, Scheduled
from lazy_compile.calibration.calibrator import CalibrationConfig, CalibrationReport, calibrate
from lazy_compile.calibration.initial_gates import gate_start, initial_gates
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.planning import planner
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.response import measure_response
from lazy_compile.planning.search import SearchOptions
from lazy_compile.progress import no_progress
from support.sampling import STEPS, lazy_tiny_dit, sample, step_pairs
from support.slow import slow_but


@pytest.fixture(autouse=True)
def brief_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of gates: how good the plan is that they start from does not matter."""
    monkeypatch.setattr(planner, "SearchOptions", lambda: SearchOptions(rounds=0))


PLAN = CacheSchedule.random(0.4, STEPS, 4, seed=3)
"""Given where it does not matter what the gates start from: nothing is searched then."""


def options(**changes: Any) -> CalibrationConfig:
    return CalibrationConfig(**{"target_lazy_ratio": 0.4, "iterations": 3, "checkpoint_every": 1, **changes})


@pytest.mark.parametrize(
    ("reuse", "objective"),
    [
        ("linear", "rollout"),
        pytest.param("last", "paper", marks=pytest.mark.slow),
        pytest.param("linear", "paper", marks=pytest.mark.slow),
        pytest.param("last", "rollout", marks=pytest.mark.slow),
    ],
)
def test_the_target_ratio_is_reached(reuse: Any, objective: Any) -> None:
    lazy = lazy_tiny_dit(reuse=reuse)
    report = calibrate(lazy, options(objective=objective), sample=sample, data=step_pairs(3))
    assert isinstance(lazy.policy, Learned)
    lazy.reset_stats()
    sample(lazy, 77)
    assert report.lazy_ratio == pytest.approx(0.4, abs=0.03)
    assert lazy.stats.lazy_ratio == pytest.approx(0.4, abs=0.08)


@dataclass(frozen=True)
class Calibrated:
    """One calibration from a searched plan on: its report, how far it said that each stage was, the weights before."""

    report: CalibrationReport
    told: dict[str, tuple[int, int]]
    before: dict[str, Tensor]


@cache
def calibrated() -> Calibrated:
    lazy, told = lazy_tiny_dit(), {}

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        told[stage] = (done, total)

    before = {name: value.clone() for name, value in lazy.original.state_dict().items()}
    return Calibrated(calibrate(lazy, options(), sample=sample, on_progress=on_progress), told, before)


def test_every_stage_is_told_of_until_it_is_done() -> None:
    told = calibrated().told
    assert {"searching schedules", "training gates", "setting the ratio"} <= told.keys()
    assert all(done == total for done, total in told.values())


def test_a_compute_target_is_reached() -> None:
    lazy = lazy_tiny_dit()
    report = calibrate(lazy, options(target_lazy_ratio=None, target_compute_ratio=0.7), sample=sample)
    assert report.compute_ratio == pytest.approx(0.7, abs=0.03)


def test_only_the_gates_are_trained() -> None:
    done, original = calibrated(), lazy_tiny_dit().original
    assert all(torch.equal(value, done.before[name]) for name, value in original.state_dict().items())
    assert all(parameter.grad is None for parameter in original.parameters())
    assert len(done.report.history) == 3


def test_training_moves_the_weights_of_every_gate_that_can_choose() -> None:
    from lazy_compile.calibration.trainer import GateTrainer

    trainer = GateTrainer(
        lazy_tiny_dit(), options(), sample, plan=PLAN, checkpoint=None, on_progress=lambda *unused: None
    )
    table = trainer.train(None)
    assert table.weight[0].eq(0).all(), "the first step has no choice"
    for row in table.weight[1:]:
        assert all(part.abs().max() > 0 for part in row.split(list(table.features)))


def test_untrained_gates_repeat_the_plan() -> None:
    lazy = lazy_tiny_dit()
    slopes = np.random.default_rng(0).uniform(0.5, 1.0, (STEPS, 4))
    schedule = CacheSchedule(CacheSchedule.random(0.4, STEPS, 4, seed=3).should_compute, slopes)
    lazy.policy = Scheduled(schedule)
    by_schedule = sample(lazy, 5)
    start = gate_start(lazy, Budget(lazy_ratio=0.4), sample, schedule, 0, no_progress)
    assert start.planned.schedule is schedule
    assert np.array_equal(start.planned.margin > 0, schedule.should_compute)
    lazy.policy = Learned(initial_gates(lazy, start, None))
    torch.testing.assert_close(sample(lazy, 5), by_schedule)
    assert lazy.stats.lazy_ratio == pytest.approx(schedule.lazy_ratio)


def test_what_an_output_is_worth_is_felt_by_the_samples() -> None:
    lazy = lazy_tiny_dit()
    response = measure_response(lazy, sample, CacheSchedule.always_compute(STEPS, 4), seed=0, directions=16)
    assert response.sensitivity is not None
    # The last step moves the samples by 0.1 times its output, earlier ones also by what follows from them.
    assert response.sensitivity[-1] == pytest.approx(0.01, rel=0.1)
    assert response.timesteps is not None
    assert len(response.timesteps) == len(response.sensitivity) == STEPS


def test_the_better_of_planned_and_trained_gates_is_kept() -> None:
    report = calibrate(lazy_tiny_dit(), options(learning_rate=0.5), sample=sample, plan=PLAN)
    assert report.kept == ("planned" if report.planned_error <= report.trained_error else "trained")


class Killed(Exception):
    pass


def interrupted(after: int) -> Any:
    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "training gates" and done == after:
            raise Killed

    return on_progress


def same_gates(left: CalibrationReport, right: CalibrationReport) -> bool:
    return torch.equal(left.table.weight, right.table.weight) and torch.equal(left.table.bias, right.table.bias)


@pytest.mark.parametrize("objective", slow_but(["rollout"], ["rollout", "paper"]))
def test_a_killed_calibration_resumes_and_ends_at_the_same_gates(tmp_path: Path, objective: Any) -> None:
    config = options(objective=objective)

    def run(**how: Any) -> CalibrationReport:
        return calibrate(lazy_tiny_dit(), config, sample=sample, data=step_pairs(3), plan=PLAN, **how)

    whole = run()
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(Killed):
        run(checkpoint=path, on_progress=interrupted(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    resumed = run(checkpoint=path)
    assert same_gates(whole, resumed)
    assert resumed.history == whole.history


def test_a_checkpoint_of_other_options_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"

    def run(**changes: Any) -> CalibrationReport:
        config = options(iterations=0, **changes)
        return calibrate(lazy_tiny_dit(), config, sample=sample, plan=PLAN, checkpoint=path)

    run()
    with pytest.raises(ArtifactError, match="another calibration"):
        run(seed=9)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="cannot read"):
        run()


def test_gates_on_knots_serve_another_number_of_steps() -> None:
    lazy = lazy_tiny_dit()
    report = calibrate(lazy, options(knots=4), sample=sample, plan=PLAN)
    assert len(report.table.knots) == 4
    assert report.table.interpolation == "linear"
    between = float(report.table.knots[1] + report.table.knots[2]) / 2
    expected = (report.table.bias[1] + report.table.bias[2]) / 2
    assert torch.allclose(report.table.row(between).bias, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "guess"}, "expected 'rollout' or 'paper'"),
        ({"target_compute_ratio": 0.5}, "exactly one"),
        ({"target_lazy_ratio": 2.0}, "between 0 and 1"),
        ({"knots": 1}, "2 or more"),
        ({"iterations": -1}, "0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**changes)


def test_the_papers_objective_asks_for_data() -> None:
    with pytest.raises(ConfigError, match="needs data"):
        calibrate(lazy_tiny_dit(), options(objective="paper"), sample=sample)


def test_data_that_ends_early_is_reported() -> None:
    with pytest.raises(ConfigError, match="ended after 1 pairs"):
        calibrate(lazy_tiny_dit(), options(objective="paper"), sample=sample, data=step_pairs(1), plan=PLAN)


def test_samples_that_are_not_finite_are_reported() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        calibrate(lazy_tiny_dit(), options(), sample=lambda denoiser, seed: sample(denoiser, seed) * np.nan)


def test_calibration_works_inside_inference_mode() -> None:
    def under_inference_mode(denoiser: Any, seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return sample(denoiser, seed)

    lazy = lazy_tiny_dit()
    report = calibrate(lazy, options(iterations=1), sample=under_inference_mode)
    assert report.lazy_ratio == pytest.approx(0.4, abs=0.05)
    assert len(report.table.knots) == STEPS
