"""``examples/gpu_measure`` in its small mode: everything that a CPU has runs, adds up and agrees with eager steps."""

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

import lazy_compile

FOLDER = Path(__file__).parents[2] / "examples" / "gpu_measure"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import lean_steps
    import measure
    import runtimes
    import shapes

    return {"lean_steps": lean_steps, "measure": measure, "runtimes": runtimes, "shapes": shapes}


@pytest.mark.slow
def test_one_command_measures_what_is_here(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "measure.py"), "--small", "--repeats", "2", "--groups", "1,block"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu_measure.json").read_text())
    assert result["left_out"] == []
    models = {row["model"] for row in result["rows"]}
    kinds = {(row["runtime"], row["gating"], row["group"]) for row in result["rows"]}
    assert len(models) == 2
    assert kinds == {("PyTorch eager", "PyTorch", group) for group in ("1", "block")} | {
        ("ONNX Runtime", gating, group) for gating in ("predicate", "input", "schedule") for group in ("1", "block")
    }
    assert len(result["rows"]) == len(models) * len(kinds) * 5
    assert len(result["verdicts"]) == len(models) * len(kinds)
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["gated_ms"] / row["dense_ms"])
        assert row["ideal"] == 1 if row["reuse"] == 0 else row["ideal"] <= 1
        assert row["reuse"] < 1 or row["ideal"] < 1
    assert "us a gate" in done.stdout


def test_masks_are_even_and_keep_groups_together(modules: Any) -> None:
    mask_of = modules["runtimes"].mask_of
    assert mask_of(0.5, range(8)).tolist() == [False, True] * 4
    assert mask_of(0.25, [0, 0, 2, 2, 4, 4, 6, 6]).tolist() == [False, False, *[True] * 6]
    assert (mask_of(0.0, range(4)).all(), mask_of(1.0, range(4)).any()) == (True, False)


def test_the_verdict_knows_both_arms_from_one(modules: Any) -> None:
    measure = modules["measure"]

    def rows(times: list[float]) -> list[Any]:
        return [
            measure.Row("m", "r", "input", "1", 10, reuse, 10.0, time, time / 10, 1 - 0.8 * reuse)
            for reuse, time in zip((0.0, 0.5, 1.0), times, strict=True)
        ]

    sound = measure.verdict(rows([11.0, 6.6, 2.2]))
    assert (sound.gate_us, sound.skipped) == (pytest.approx(100.0), pytest.approx(1.0))
    assert measure.verdict(rows([18.0, 18.0, 18.0])).skipped == pytest.approx(0.0)


@pytest.mark.slow
def test_lean_steps_are_those_of_the_lazy_model(modules: Any) -> None:
    """What is compiled or captured on a GPU, run here as it is."""
    model, inputs = modules["shapes"].make(
        modules["shapes"].SMALL["DiT, 2 small blocks"], torch.float32, torch.device("cpu")
    )
    lazy = lazy_compile.transform(model, inputs, reuse="last")
    table = np.array([[True] * 4, [True, False, False, True], [False] * 4, [False, True, True, False]])
    lazy.policy = lazy_compile.Scheduled(lazy_compile.CacheSchedule(table))
    steps = modules["lean_steps"].LeanSteps(lazy, inputs)
    with torch.no_grad():
        for row in table:
            torch.testing.assert_close(steps.step(row)()[0], lazy(**inputs)[0])
            inputs["timestep"] -= 1
