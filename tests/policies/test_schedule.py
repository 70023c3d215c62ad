from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazy_compile import CacheSchedule
from lazy_compile.errors import ArtifactError, ConfigError


def test_ratios_are_those_counted_by_hand() -> None:
    schedule = CacheSchedule(np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=bool))
    assert (schedule.steps, schedule.branches) == (4, 3)
    assert schedule.lazy_ratio == pytest.approx(5 / 12)
    # of 4 steps, branch 0 saves 2, branch 1 saves 1, branch 2 saves 2
    saved = (2 * 10 + 1 * 20 + 2 * 30) / 4
    assert schedule.compute_ratio([10, 20, 30], 100) == pytest.approx(1 - saved / 100)


def test_computing_always_saves_nothing() -> None:
    schedule = CacheSchedule.always_compute(5, 3)
    assert schedule.should_compute.all()
    assert (schedule.lazy_ratio, schedule.compute_ratio([1, 2, 3], 10)) == (0.0, 1.0)


@pytest.mark.parametrize(("n", "column"), [(1, "11111"), (2, "10101"), (3, "10010"), (9, "10000")])
def test_every_nth_step_computes(n: int, column: str) -> None:
    schedule = CacheSchedule.every(n, 5, 2)
    for branch in range(2):
        assert "".join(str(int(value)) for value in schedule.should_compute[:, branch]) == column


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(ratio=st.floats(0, 1), steps=st.integers(1, 9), branches=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_random_schedule_has_the_share_that_was_asked_for(ratio: float, steps: int, branches: int, seed: int) -> None:
    schedule = CacheSchedule.random(ratio, steps, branches, seed)
    reused = int((~schedule.should_compute).sum())
    assert reused == min(round(ratio * steps * branches), (steps - 1) * branches)
    assert schedule.should_compute[0].all()
    assert schedule == CacheSchedule.random(ratio, steps, branches, seed)


def test_random_schedules_differ_by_their_seed() -> None:
    assert CacheSchedule.random(0.5, 8, 8, seed=0) != CacheSchedule.random(0.5, 8, 8, seed=1)


def test_a_schedule_is_a_copy_that_cannot_be_written_to() -> None:
    table = np.ones((2, 2), dtype=bool)
    schedule = CacheSchedule(table)
    table[1, 1] = False
    assert schedule.should_compute.all()
    with pytest.raises(ValueError, match="read-only"):
        schedule.should_compute[1, 1] = False


def test_schedules_are_equal_by_their_decisions() -> None:
    assert CacheSchedule.every(2, 4, 2) == CacheSchedule.every(2, 4, 2)
    assert CacheSchedule.every(2, 4, 2) != CacheSchedule.every(3, 4, 2)
    assert CacheSchedule.every(2, 4, 2) != CacheSchedule.every(2, 5, 2)
    assert CacheSchedule.every(2, 4, 2) != "every second step"
    half = CacheSchedule(np.ones((4, 2)), np.full((4, 2), 0.5))
    assert half == CacheSchedule(np.ones((4, 2)), np.full((4, 2), 0.5))
    assert half != CacheSchedule(np.ones((4, 2)))
    assert half != CacheSchedule(np.ones((4, 2)), np.ones((4, 2)))


def test_a_schedule_survives_json(tmp_path: Path) -> None:
    schedule = CacheSchedule.random(0.5, 6, 4, seed=1)
    values = schedule.to_json()
    assert values["should_compute"][0] == [1, 1, 1, 1]
    assert (values["steps"], values["branches"]) == (6, 4)
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps(values))
    assert CacheSchedule.load(file) == schedule
    sloped = CacheSchedule(schedule.should_compute, np.arange(24.0).reshape(6, 4) / 7)
    assert CacheSchedule.from_json(json.loads(json.dumps(sloped.to_json()))) == sloped
    assert np.array_equal(sloped.tied([0, 0, 2, 2]).slopes[:, 1], sloped.slopes[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheSchedule(np.ones(3)), "a schedule is a table [steps, branches]; this one has shape (3,)"),
        (lambda: CacheSchedule(np.ones((3, 0))), "a schedule is a table [steps, branches]; this one has shape (3, 0)"),
        (
            lambda: CacheSchedule(np.array([[1, 0], [1, 1]])),
            "the first step of a schedule must compute every branch, since no cache exists before it",
        ),
        (
            lambda: CacheSchedule(np.ones((3, 2)), np.ones((2, 3))),
            "slopes of shape (2, 3) do not fit a schedule of shape (3, 2); give one finite number for each decision",
        ),
        (lambda: CacheSchedule.every(0, 5, 2), "n is 0; use 1 to compute at every step, 2 at every second one"),
        (lambda: CacheSchedule.random(-0.1, 5, 2, 0), "lazy_ratio is -0.1; it is a share between 0 and 1"),
        (lambda: CacheSchedule.random(30, 5, 2, 0), "lazy_ratio is 30; it is a share between 0 and 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "values",
    [
        {},
        [1, 2],
        None,
        {"should_compute": None},
        {"should_compute": [[1, 1], [1]]},
        {"should_compute": [["1", "0"]]},
        {"should_compute": [[1.0, 0.3]]},
        {"should_compute": [[1, 2]]},
    ],
)
def test_json_that_is_no_schedule_is_refused(values: Any) -> None:
    with pytest.raises(ArtifactError) as caught:
        CacheSchedule.from_json(values)
    assert str(caught.value).startswith("this is not a schedule (")
    assert str(caught.value).endswith("; expected a JSON object with should_compute[step][branch]")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"{not json", b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        CacheSchedule.load(file)
    assert str(caught.value).startswith(f"cannot read {file}: ")
