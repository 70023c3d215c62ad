"""Schedules that other tools wrote, and gates frozen to a schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lazy_compile import CacheSchedule, Learned, Scheduled
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.planning.import_schedule import freeze, from_routers, from_smoothcache, import_schedule
from support.lowering import random_gates
from support.sampling import STEPS, lazy_tiny_dit, sample, timesteps


def written(folder: Path, values: Any) -> Path:
    path = folder / "schedule.json"
    path.write_text(json.dumps(values))
    return path


def test_smoothcache_names_components_of_all_blocks_or_of_one() -> None:
    branches = lazy_tiny_dit().branches
    assert [branch.kind.value for branch in branches] == ["self_attention", "mlp"] * 2
    of_all = from_smoothcache({"attn": [1, 0, 1], "mlp": [1, 1, 0]}, branches)
    assert of_all.should_compute.astype(int).tolist() == [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]]
    of_one = from_smoothcache({"attn1": [1, 1, 0], "ff-1": [1, 0, 1]}, branches)
    assert of_one.should_compute.astype(int).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1]]


def test_routers_of_half_the_steps_belong_to_the_second_of_each_pair() -> None:
    halves = from_routers([[0.9, 0.1], [0.5, 0.6]], steps=4)
    assert halves.should_compute.astype(int).tolist() == [[1, 1], [1, 0], [1, 1], [0, 1]]
    each = from_routers([[0.1, 0.1], [0.5, 0.6]], steps=2)
    assert each.should_compute.astype(int).tolist() == [[1, 1], [0, 1]]


def test_a_file_says_by_its_content_what_it_is(tmp_path: Path) -> None:
    branches = lazy_tiny_dit().branches
    whole = CacheSchedule.every(2, 4, len(branches))
    for values in (
        whole.to_json(),
        {"steps_mask": [1, 0, 1, 0]},
        {"routers": [[0.0] * 4] * 2},
        {"attn": [1, 0, 1, 0], "mlp": [1, 0, 1, 0]},
    ):
        assert import_schedule(written(tmp_path, values), branches, 4) == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 0], "no schedule that is known here"),
        ({"attn": [1, 0, 1], "mlp": [1, 0]}, "one number of steps for all"),
        ({"conv": [1, 0]}, "component 'conv' is not known"),
        ({"attn2": [1, 0]}, "component 'attn2' has no branch in this model"),
        ({"attn-7": [1, 0]}, "component 'attn-7' has no branch in this model"),
        ({"attn": [1, 2]}, "expected 0 and 1"),
        ({"routers": [[0.5] * 4] * 3}, "no routers for 2 steps"),
        ({"steps_mask": [1, 3]}, "expected a list of 0 and 1"),
        ({"steps_mask": [1, 0, 1]}, "is for 3 steps and 4 branches, this model takes 2 and has 4"),
    ],
)
def test_what_does_not_fit_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, ConfigError), match=message) as caught:
        import_schedule(written(tmp_path, values), lazy_tiny_dit().branches, 2)
    assert "\n" not in str(caught.value)


def test_frozen_gates_decide_as_most_rows_did() -> None:
    lazy = lazy_tiny_dit()
    with pytest.raises(ConfigError, match="run a trajectory"):
        freeze(lazy.stats)
    lazy.policy = Learned(random_gates(lazy, torch.tensor(timesteps(), dtype=torch.float64)))
    sample(lazy, 0)
    shares, schedule = lazy.stats.reuse_table, freeze(lazy.stats)
    assert ((shares > 0) & (shares < 1)).any()
    assert np.array_equal(schedule.should_compute, shares <= 0.5)
    lazy.policy = Scheduled(schedule)
    sample(lazy, 0)
    assert lazy.stats.decisions_varying_between_samples == 0.0
    assert schedule.steps == STEPS
