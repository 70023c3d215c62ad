"""A search that is interrupted, and samples that are not finite."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.calibration.calibrator import CalibrationConfig, calibrate
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.planning import search
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.journal import Journal
from lazy_compile.planning.planner import plan
from lazy_compile.planning.sample_response import measure_response
from lazy_compile.planning.search import ScheduleSearch, SearchOptions, robust_losses
from lazy_compile.progress import no_progress
from support import planted

QUICK, BUDGET = SearchOptions(rounds=1), Budget(lazy_ratio=7 / 16)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return planted.planted(depends_on_sample=True)


@pytest.fixture(scope="module")
def finished(lazy: LazyModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheSchedule, Path]:
    """A plan, and its checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "FINAL_SAMPLES", 8)
        return planned(lazy, folder), folder


@pytest.fixture
def checkpoint(finished: tuple[CacheSchedule, Path], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished[1], tmp_path / "checkpoint"))


def planned(lazy: LazyModule, checkpoint: Path | None = None, **changes: Any) -> CacheSchedule:
    options = {"options": QUICK, "budget": BUDGET, "checkpoint": checkpoint, **changes}
    return plan(lazy, planted.sample, **options)


@pytest.mark.slow
def test_a_search_that_is_killed_at_every_measurement_ends_at_the_same_plan(
    lazy: LazyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, runs, write = planned(lazy), 0, Journal.write

    def write_and_die(journal: Journal, name: str, arrays: Any) -> None:
        write(journal, name, arrays)
        raise Killed

    monkeypatch.setattr(Journal, "write", write_and_die)
    while True:
        try:
            resumed = planned(lazy, tmp_path)
            break
        except Killed:
            runs += 1
    assert resumed == whole
    assert runs == len(list(tmp_path.glob("*.safetensors"))) > 20


def test_what_was_measured_is_not_measured_again(
    lazy: LazyModule, finished: tuple[CacheSchedule, Path], checkpoint: Path
) -> None:
    trajectories = 0

    def counted(denoiser: Any, seed: int) -> Tensor:
        nonlocal trajectories
        trajectories += 1
        return planted.sample(denoiser, seed)

    assert plan(lazy, counted, BUDGET, options=QUICK, checkpoint=checkpoint) == finished[0]
    assert trajectories == 1  # counts the steps


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"budget": Budget(lazy_ratio=0.3)}, "budget"), ({"seed": 5}, "seed"), ({"options": SearchOptions(2)}, "options")],
)
def test_a_checkpoint_of_another_search_is_refused(
    lazy: LazyModule, checkpoint: Path, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(ArtifactError, match=f"belongs to another search: {what} differ"):
        planned(lazy, checkpoint, **changes)


def test_a_checkpoint_of_other_weights_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="weights differ"):
        planned(planted.planted(depends_on_sample=False), checkpoint)


def test_a_damaged_measurement_is_reported(lazy: LazyModule, checkpoint: Path) -> None:
    file = next(checkpoint.glob("response-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="cannot read"):
        planned(lazy, checkpoint)


SCRIPT = """
import sys
from lazy_compile.planning import search
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import plan
from lazy_compile.planning.search import SearchOptions
from lazy_compile.storage import save_json
from support import planted
search.FINAL_SAMPLES = 8
lazy = planted.planted(depends_on_sample=True)
found = plan(
    lazy, planted.sample, Budget(lazy_ratio=7 / 16), options=SearchOptions(rounds=1), checkpoint=sys.argv[1] or None
)
save_json(sys.argv[2], found.to_json())
"""


@pytest.mark.slow
def test_a_process_that_is_killed_ends_at_the_same_plan(lazy: LazyModule, tmp_path: Path) -> None:
    folder, output, draw = tmp_path / "checkpoint", tmp_path / "plan.json", random.Random()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(output)]
    process, wanted = subprocess.Popen(command, env=environment), draw.randint(1, 20)
    while len(list(folder.glob("*.safetensors"))) < wanted and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    subprocess.run(command, env=environment, check=True)
    assert CacheSchedule.load(output) == planned(lazy)


def test_the_plan_is_not_worse_than_any_start_on_unseen_noise(
    lazy: LazyModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    considered: list[CacheSchedule] = []
    judge = ScheduleSearch._judge

    def noted(self: ScheduleSearch, candidates: Any, seed: int) -> Any:
        considered.extend(candidates)
        return judge(self, candidates, seed)

    monkeypatch.setattr(ScheduleSearch, "_judge", noted)
    found = planned(lazy)
    starts = [each for each in considered if each.slopes is None and each.lazy_ratio >= 7 / 16]
    assert len(starts) > 8
    judging = ScheduleSearch(lazy, planted.sample, np.ones(2), 9.0, QUICK)
    errors = np.concatenate([judge(judging, [found, *starts], seed) for seed in range(500, 504)], axis=1)
    losses = robust_losses(errors).mean(axis=1)
    assert losses[0] <= losses.min() * (1 + 1e-6)
    assert errors[0].mean() <= errors.mean(axis=1).min() * (1 + 1e-6)


# Samples that are not finite


def breaking(where: Callable[[LazyModule], bool]) -> Callable[[LazyModule, int], Tensor]:
    def sampler(denoiser: LazyModule, seed: int) -> Tensor:
        samples = planted.sample(denoiser, seed)
        return samples * torch.nan if where(denoiser) else samples

    return sampler


def test_a_response_whose_samples_are_not_finite_is_refused(lazy: LazyModule) -> None:
    calls: list[int] = []

    def second_breaks(denoiser: LazyModule, seed: int) -> Tensor:
        calls.append(seed)
        samples = planted.sample(denoiser, seed)
        return samples * torch.nan if len(calls) == 2 else samples

    with pytest.raises(ConfigError, match="samples under a schedule that reuses 50%, or their gradients, are not"):
        measure_response(lazy, second_breaks, CacheSchedule.every(2, planted.STEPS, 2), seed=0)


def test_a_search_whose_every_schedule_breaks_is_refused(lazy: LazyModule) -> None:
    with pytest.raises(ConfigError, match="samples are not finite under any of"):
        plan(lazy, breaking(lambda denoiser: isinstance(denoiser.policy, Scheduled)), BUDGET, options=QUICK)


def test_a_schedule_that_breaks_is_not_chosen(lazy: LazyModule) -> None:
    broken, fine = CacheSchedule.every(2, planted.STEPS, 2), CacheSchedule.every(4, planted.STEPS, 2)

    def sampler(denoiser: LazyModule, seed: int) -> Tensor:
        samples, policy = planted.sample(denoiser, seed), denoiser.policy
        return samples * torch.nan if isinstance(policy, Scheduled) and policy.schedule is broken else samples

    search = ScheduleSearch(lazy, sampler, np.ones(2), 9.0, QUICK)
    assert search._best([broken, fine], 0)[0] is fine


def test_a_model_that_breaks_is_refused(lazy: LazyModule) -> None:
    for run in (
        lambda sampler: plan(lazy, sampler, BUDGET, options=QUICK),
        lambda sampler: calibrate(lazy, CalibrationConfig(target_lazy_ratio=0.4), sample=sampler),
    ):
        with pytest.raises(ConfigError, match="not finite"):
            run(breaking(lambda _: True))


def test_the_search_makes_no_more_trajectories_than_it_says(lazy: LazyModule) -> None:
    trajectories = 0

    def counted(denoiser: Any, seed: int) -> Tensor:
        nonlocal trajectories
        trajectories += 1
        return planted.sample(denoiser, seed)

    search = ScheduleSearch(lazy, counted, np.ones(2), 9.0, QUICK)
    search.run(search.starts(planted.STEPS, 0), 0, no_progress)
    assert trajectories <= QUICK.trajectories
