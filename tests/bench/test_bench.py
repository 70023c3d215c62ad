"""The speed benchmark in miniature: its schedules, and the form of what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazy_compile.bench import overhead, speed
from lazy_compile.bench import timing as in_turn
from lazy_compile.bench.speed import REUSE, rotating_schedule, run


@pytest.mark.parametrize("reuse", REUSE)
def test_every_step_reuses_the_asked_share_of_whole_blocks_and_every_block_has_its_turn(reuse: float) -> None:
    table = rotating_schedule(reuse, steps=3 + 24, blocks=12, per_block=2).should_compute
    assert table[:3].all()
    assert (table[:, ::2] == table[:, 1::2]).all()
    assert ((~table[3:]).sum(axis=1) == round(24 * reuse)).all()
    assert len(np.unique((~table[3:]).sum(axis=0))) == 1


@pytest.mark.slow
def test_it_writes_a_row_for_every_runtime_arm_and_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = (0.0, 0.5, 1.0)
    monkeypatch.setattr(speed, "REUSE", shares)
    settings: dict[str, Any] = {"repeats": 2, "layers": 2, "heads": 1}
    run(tmp_path, arms=("last",), runtimes=("eager",), **settings)
    rows = run(tmp_path, arms=("linear",), **settings)
    written = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == len(written) == 3 * len(shares)
    arms = {(row["runtime"], row["reuse_arm"]) for row in written}
    assert arms == {("eager", "last"), ("eager", "linear"), ("onnxruntime", "linear")}
    for row in written:
        assert row["efficiency"] == pytest.approx(row["ideal_ratio"] / row["time_ratio"])
        assert (row["ideal_ratio"] == 1.0) == (row["reuse"] == 0.0)


def test_overhead_is_measured_against_the_original_in_turn(tmp_path: Path) -> None:
    (row,) = overhead.run(tmp_path, models=["Wan"], repeats=2, layers=1, heads=1)
    (written,) = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert (written["model"], written["branches"], written["bitwise_equal"]) == ("Wan", 3, True)
    low, high = row.quartiles
    assert 0 < low <= row.ratio <= high
    assert np.isfinite([row.computing_us, row.reusing_us]).all()


def test_neighbouring_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower and slower changes the times, and not the ratio."""
    clock = [0.0]
    monkeypatch.setattr(in_turn.time, "perf_counter", lambda: clock[0])
    order = []

    def takes(seconds: float, name: str) -> Callable[[int], None]:
        def act(step: int) -> None:
            order.append(f"{name}{step}")
            clock[0] += seconds * 2**step if step else 1000.0

        return act

    timing = in_turn.time_in_turn(takes(1.0, "a"), takes(3.0, "b"), repeats=5, warm_steps=1)
    assert timing.ratio == pytest.approx(3.0)
    assert timing.quartiles == pytest.approx((3.0, 3.0))
    assert timing.baseline_ms == pytest.approx(8000.0)
    assert order[:4] == ["b0", "a0", "a1", "b1"]
