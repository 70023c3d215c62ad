"""What gates are compared with: the plan as it was, on noise that nothing was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, GateTable, LazyModule, Learned, Scheduled
from lazy_compile.calibration.calibrator import CalibrationConfig, calibrate
from lazy_compile.calibration.comparison import HeldOutComparison, MatchedGates
from lazy_compile.calibration.trainer import GateTrainer
from lazy_compile.errors import ConfigError
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import plan
from lazy_compile.planning.reuse_effects import measure_effects
from lazy_compile.planning.sample_response import dense_samples
from lazy_compile.planning.search import SearchOptions
from lazy_compile.progress import no_progress
from support import planted
from support.sampling import STEPS, lazy_tiny_dit, sample

HALF = CacheSchedule.random(0.4, STEPS, 4, seed=3)


def options(**changes: Any) -> CalibrationConfig:
    return CalibrationConfig(**{"target_lazy_ratio": 0.4, "iterations": 2, "learning_rate": 0.5, **changes})


def trainer_of(lazy: LazyModule, checkpoint: Path | None = None, **changes: Any) -> GateTrainer:
    return GateTrainer(lazy, options(**changes), sample, plan=HALF, checkpoint=checkpoint, on_progress=no_progress)


def storages(tensors: Iterator[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def copies(table: GateTable) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in table.tensors.items()}


def same(table: GateTable, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in table.tensors.items())


def written_by(trainer: GateTrainer) -> Iterator[Tensor]:
    yield from (trainer.weight, trainer.bias, trainer.mean_features)
    yield from (value for state in trainer.optimizer.state.values() for value in state.values())


def test_training_writes_to_nothing_that_it_is_compared_with() -> None:
    trainer = trainer_of(lazy_tiny_dit())
    before = copies(trainer.initial)
    table = trainer.train(None)
    assert not torch.equal(table.weight, before["weight"])
    assert same(trainer.initial, before)
    assert not storages(written_by(trainer)) & storages(iter(trainer.initial.tensors.values()))
    assert not storages(written_by(trainer)) & storages(iter((table.weight, table.bias)))


def test_gates_that_resume_are_compared_with_the_plan_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    first = trainer_of(lazy_tiny_dit(), path, checkpoint_every=1)
    before = copies(first.initial)
    trained = first.train(None)
    resumed = trainer_of(lazy_tiny_dit(), path, checkpoint_every=1)
    assert same(resumed.initial, before)
    assert torch.equal(resumed.table().weight, trained.weight)
    assert not storages(written_by(resumed)) & storages(iter(resumed.initial.tensors.values()))


@pytest.mark.parametrize(("learning_rate", "iterations"), [(0.5, 0), (0.5, 2), (1e-9, 2)])
def test_no_table_of_a_report_asks_for_gradients(iterations: int, learning_rate: float) -> None:
    report = calibrate(
        lazy_tiny_dit(), options(iterations=iterations, learning_rate=learning_rate), sample=sample, plan=HALF
    )
    for table in (report.table, report.trained):
        assert not any(tensor.requires_grad for tensor in table.tensors.values())
        assert table.row(500.0).weight.numpy() is not None


def test_the_planned_error_is_that_of_the_plan() -> None:
    lazy = lazy_tiny_dit()
    report = calibrate(lazy, options(target_lazy_ratio=HALF.lazy_ratio), sample=sample, plan=HALF)
    untrained = calibrate(lazy, options(target_lazy_ratio=HALF.lazy_ratio, iterations=0), sample=sample, plan=HALF)
    assert report.planned_error == untrained.planned_error
    assert report.trained_error != report.planned_error


def test_a_sampler_may_return_the_same_memory_every_time() -> None:
    buffer = torch.empty(4, 3, 8, 8)

    def into_buffer(denoiser: Any, seed: int) -> Tensor:
        return buffer.copy_(sample(denoiser, seed).detach())

    lazy = lazy_tiny_dit()
    dense = dense_samples(lazy, into_buffer, 0)
    before = dense.clone()
    dense_samples(lazy, into_buffer, 1)
    assert torch.equal(dense, before)
    assert (measure_effects(lazy, into_buffer).final[1:] > 0).all()
    comparison = HeldOutComparison(lazy, into_buffer, Budget(lazy_ratio=0.4), 0, no_progress)
    assert comparison.match_target(trainer_of(lazy).initial, enough=0.05).error > 0


def planted_report(depends_on_sample: bool) -> tuple[LazyModule, CacheSchedule, Any]:
    lazy = planted.planted(depends_on_sample)
    budget = Budget(lazy_ratio=7 / 16)
    schedule = plan(lazy, planted.sample, budget, options=SearchOptions(rounds=1))
    config = CalibrationConfig(target_lazy_ratio=7 / 16, iterations=24, learning_rate=0.5)
    return lazy, schedule, calibrate(lazy, config, sample=planted.sample, plan=schedule)


def test_gates_find_decisions_that_depend_on_the_sample() -> None:
    lazy, _, report = planted_report(depends_on_sample=True)
    assert report.kept == "trained"
    assert report.lazy_ratio == pytest.approx(7 / 16, abs=0.04)
    assert report.trained_error < 0.5 * report.planned_error
    lazy.reset_stats()
    planted.sample(lazy, 77)
    assert lazy.stats.lazy_ratio == pytest.approx(7 / 16, abs=0.04)


def test_where_nothing_depends_on_the_sample_the_plan_is_kept_bit_for_bit() -> None:
    lazy, schedule, report = planted_report(depends_on_sample=False)
    assert report.kept == "planned"
    assert not report.table.weight.any()
    assert np.array_equal(report.table.bias.numpy() > 0, schedule.should_compute)
    assert schedule.slopes is not None
    assert report.table.slope is not None
    assert torch.equal(report.table.slope, torch.from_numpy(schedule.slopes.copy()).float())
    lazy.policy = Learned(report.table)
    by_gates = planted.sample(lazy, 5)
    lazy.policy = Scheduled(CacheSchedule(schedule.should_compute, schedule.slopes.astype(np.float32)))
    assert torch.equal(by_gates, planted.sample(lazy, 5))


def matched(errors: list[float]) -> MatchedGates:
    return MatchedGates(None, 0.5, 0.5, np.array(errors))  # type: ignore[arg-type]


def test_one_sample_that_diverged_does_not_decide() -> None:
    plan_errors = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 900.0]
    assert not matched([1.1, 1.2, 1.1, 1.3, 1.1, 1.2, 1.1, 1.0]).clearly_beats(matched(plan_errors))
    assert not matched([0.5, 0.6, 0.5, 0.7, 0.5, 0.6, 0.5, 950.0]).clearly_beats(matched(plan_errors))
    assert matched([0.5, 0.6, 0.5, 0.7, 0.5, 0.6, 0.5, 800.0]).clearly_beats(matched(plan_errors))


def test_a_gain_within_its_uncertainty_is_none() -> None:
    assert not matched([0.4, 1.5, 0.5, 1.4]).clearly_beats(matched([1.0, 1.0, 1.0, 1.0]))
    assert not matched([1.0, 1.0]).clearly_beats(matched([1.0, 1.0]))


def test_gates_whose_samples_are_not_finite_are_reported() -> None:
    lazy = lazy_tiny_dit()
    gates = trainer_of(lazy).initial

    def breaks_where_it_reuses(denoiser: LazyModule, seed: int) -> Tensor:
        samples = sample(denoiser, seed)
        return samples * torch.nan if isinstance(denoiser.policy, Learned) else samples

    comparison = HeldOutComparison(lazy, breaks_where_it_reuses, Budget(lazy_ratio=0.4), 0, no_progress)
    lazy.policy = Scheduled(HALF)
    with pytest.raises(ConfigError, match="samples under the gates are not finite"):
        comparison.match_target(gates)
