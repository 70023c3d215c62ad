"""Whose latents these are: what the bench counts for samplers that add no noise, and for one that adds much."""

from __future__ import annotations

import json
from pathlib import Path

from lazy_compile.bench import identity


def test_steps_without_noise_are_proven_and_no_other_request_passes(tmp_path: Path) -> None:
    row, noisy = identity.run(tmp_path, steps=[4], schedulers=["EulerDiscreteScheduler", "DDPMScheduler"], requests=2)
    assert (row.calls, row.continued, row.exact, row.mistaken) == (6, 1.0, 1.0, 0)
    assert row.farthest < 1e-9 < 1e-3 < row.nearest
    assert noisy.exact < 1.0
    assert noisy.confused <= noisy.mistaken
    assert "| EulerDiscrete | 4 | 6 | 100.0% | 100% |" in (tmp_path / "identity.md").read_text()
    again = identity.run(tmp_path, steps=[4], schedulers=["EulerDiscreteScheduler"], requests=2)
    assert again[0] == row


def test_in_the_committed_figures_only_noise_leaves_doubt() -> None:
    rows = json.loads((Path(__file__).parents[2] / "docs" / "results" / "identity.json").read_text())["rows"]
    assert len({row["scheduler"] for row in rows}) >= 30
    assert {row["scheduler"] for row in rows if row["confused"]} <= {"LCMScheduler"}
    without_noise = [row for row in rows if row["exact"] > 0.9]
    assert len(without_noise) > 40
    assert all(row["continued"] > 0.95 and row["mistaken"] == 0 for row in without_noise)
