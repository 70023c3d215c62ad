"""Two processes, started by accelerate, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lazy_compile import CacheSchedule, Learned
from lazy_compile.calibration.calibrator import CalibrationConfig, calibrate
from lazy_compile.cli.app import app
from lazy_compile.errors import ConfigError
from lazy_compile.planning import planner
from lazy_compile.planning.search import ScheduleSearch, SearchOptions
from lazy_compile.processes import Processes
from lazy_compile.runtime import artifact
from support.sampling import STEPS, lazy_tiny_dit, sample

TESTS = Path(__file__).resolve().parents[1]
EULER = ["support.factories:tiny_dit", "--sampler", "support.factories:euler", "--steps", "4", "--json"]
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "lazy_compile"]


def alone(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def together(*arguments: object, folder: Path) -> list[dict[str, Any]]:
    """What two processes print: a JSON object for each that speaks."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


@pytest.mark.slow
def test_two_processes_find_the_gates_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "SearchOptions", SearchOptions)  # searched as long as in processes of their own
    options = ["--target-lazy-ratio", 0.4, "--iterations", 2, "--trajectories", 2]
    one = alone("calibrate", *EULER, *options, "--output", tmp_path / "one")
    (two,) = together("calibrate", *EULER, *options, "--output", tmp_path / "two", folder=tmp_path)
    first, second = (artifact.read(tmp_path / name).policy for name in ("one", "two"))
    assert isinstance(first, Learned)
    assert isinstance(second, Learned)
    assert first.table.weight.any()
    assert first.table.slope is not None
    assert second.table.slope is not None
    assert torch.allclose(first.table.slope, second.table.slope, atol=1e-6)  # of the schedule that was searched for
    assert torch.allclose(first.table.weight, second.table.weight, atol=1e-5)
    assert torch.allclose(first.table.bias, second.table.bias, atol=1e-3)
    for name in ("lazy_ratio", "planned_error", "trained_error"):
        assert one[name] == pytest.approx(two[name], rel=1e-3)


@pytest.mark.slow
def test_two_processes_sample_what_one_would_in_two_turns(tmp_path: Path) -> None:
    (values,) = together("run", *EULER, "--seed", 5, "--output", tmp_path / "both.npy", folder=tmp_path)
    for seed in (5, 6):
        alone("run", *EULER, "--seed", seed, "--output", tmp_path / f"{seed}.npy")
    turns = np.concatenate([np.load(tmp_path / "5.npy"), np.load(tmp_path / "6.npy")])
    assert np.array_equal(np.load(tmp_path / "both.npy"), turns)
    assert values["samples"] == "x".join(map(str, turns.shape))


def test_the_candidates_of_a_search_are_shared_and_judged_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = lazy_tiny_dit()
    search = ScheduleSearch(lazy, sample, np.ones(len(lazy.branches)), 1e9, SearchOptions())
    candidates = [CacheSchedule.every(every, STEPS, len(lazy.branches)) for every in (3, 2, 4)]
    alone, parts = search._best(candidates, 7), []

    def add_to_what_others_know(processes: Processes, tensor: torch.Tensor) -> torch.Tensor:
        parts.append(tensor)
        return torch.stack(parts).sum(0)

    monkeypatch.setattr(Processes, "sum", add_to_what_others_know)
    for rank in (0, 1):
        monkeypatch.setattr(Processes, "here", classmethod(lambda kind, rank=rank: kind(rank, 2)))
        found = search._best(candidates, 7)
    assert [part.any(1).tolist() for part in parts] == [[True, False, True], [False, True, False]]
    assert found[0] is alone[0] is candidates[0]  # which the other one ran
    assert found[1] == alone[1]


def test_work_that_cannot_be_shared_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "here", classmethod(lambda kind: kind(0, 2)))
    with pytest.raises(ConfigError, match="trajectories is 3, and 2 processes share them; give a multiple of"):
        calibrate(lazy_tiny_dit(), CalibrationConfig(target_lazy_ratio=0.4, trajectories=3), sample=sample)


def test_alone_every_collective_is_the_identity() -> None:
    processes, tensor = Processes(), torch.arange(3)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.sum(tensor) is tensor
    assert processes.gather(tensor) is tensor
    processes.wait()
