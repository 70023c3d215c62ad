"""The speed benchmark in miniature: its schedules, and the form of what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lazy_compile.bench import overhead
from lazy_compile.bench.speed import REUSE, rotating_schedule, run


@pytest.mark.parametrize("reuse", REUSE)
def test_every_step_reuses_the_asked_share_and_every_branch_has_its_turn(reuse: float) -> None:
    table = rotating_schedule(reuse, steps=3 + 24, branches=24).should_compute
    assert table[:3].all()
    assert ((~table[3:]).sum(axis=1) == round(24 * reuse)).all()
    assert len(np.unique((~table[3:]).sum(axis=0))) == 1


def test_it_writes_a_row_for_every_runtime_arm_and_share(tmp_path: Path) -> None:
    rows = run(tmp_path, repeats=1, layers=2, heads=1)
    written = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == len(written) == 2 * 2 * len(REUSE)
    assert {row["runtime"] for row in written} == {"eager", "onnxruntime"}
    for row in written:
        assert row["efficiency"] == pytest.approx(row["ideal_ratio"] / row["time_ratio"])
        assert (row["ideal_ratio"] == 1.0) == (row["reuse"] == 0.0)


def test_overhead_is_measured_against_the_original_in_turn(tmp_path: Path) -> None:
    (row,) = overhead.run(tmp_path, models=["Wan"], repeats=2, layers=1, heads=1)
    (written,) = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert (written["model"], written["branches"], written["bitwise_equal"]) == ("Wan", 3, True)
    assert row.ratio == pytest.approx(row.lazy_ms / row.original_ms)
    low, high = row.quartiles
    assert 0 < low <= high
