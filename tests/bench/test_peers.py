"""The comparison with peers: what is counted, what is swept and judged, and that nothing fails in silence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lazy_compile.bench import peers_cache_dit, peers_diffusers, peers_report
from lazy_compile.bench.macs import counted
from lazy_compile.bench.peer_task import PeerTask, System
from lazy_compile.bench.peers import JudgedRow, PeerRun, PeerSettings, evenly
from lazy_compile.bench.peers_report import contests, markdown, measure_peers, write
from lazy_compile.errors import ConfigError
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import no_progress

TINY = PeerSettings(
    steps=4, budgets=(0.6,), search_samples=2, samples=4, seeds=(9_100_001,), timed_samples=2, timings=2, paired=1,
    most_settings=2,
)  # fmt: skip
TAYLORSEER = peers_diffusers.SYSTEMS[0]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeerRun, list[Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("peers")
    run = PeerRun("digits", TINY, folder, no_progress)
    found = list(run.run([TAYLORSEER, _raising("broken"), _dense("sleeper"), *peers_cache_dit.SYSTEMS[:1]]))
    rows = [row for _, rows, _ in found for row in rows]
    return folder, run, rows, [{"system": system.name, "error": error} for system, _, error in found if error]


def _raising(name: str) -> System:
    def denoiser(task: PeerTask, setting: Any) -> Any:
        raise AssertionError("six blocks are\ntoo few")

    return System(name, "another", lambda task: [{}], denoiser)


def _dense(name: str) -> System:
    return System(name, "another", lambda task: [{}], lambda task, setting: task.subject.model)


def test_fewer_settings_are_spread_over_all() -> None:
    settings = [{"threshold": place} for place in range(10)]
    assert [each["threshold"] for each in evenly(settings, 4)] == [0, 2, 5, 7]
    assert evenly(settings, 10) is evenly(settings, None) is settings


def test_products_attention_and_convolutions_count() -> None:
    query = torch.zeros(1, 2, 3, 8)
    linear, conv = nn.Linear(4, 5), nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        assert counted(lambda: linear(torch.zeros(3, 4)).relu())[1] == 3 * 4 * 5
        assert counted(lambda: conv(torch.zeros(1, 1, 5, 5)))[1] == 9 * 2 * 9
        attention = counted(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    assert attention[1] == 2 * (2 * 3 * 3 * 8)


@pytest.mark.slow
def test_a_peer_is_counted_as_its_steps_say(tried: Any) -> None:
    """By another way: the steps that it computes, and the MACs of the branches in the graph."""
    _, run, rows, _ = tried
    (row,) = rows
    setting = json.loads(row.setting)
    (steps,) = [
        steps
        for warmup, interval, steps in run.task.families()
        if (warmup, interval) == (setting["disable_cache_before_step"], setting["cache_interval"])
    ]
    branches = run.task.lazy.branches
    table = np.zeros((4, len(branches)), dtype=bool)
    table[steps] = True
    expected = CacheSchedule(table).compute_ratio([each.macs for each in branches], run.task.lazy.graph.total_macs)
    assert row.compute == pytest.approx(expected, abs=1e-4)
    assert row.compute <= 0.6 + TINY.slack
    assert 0 < row.rmse == pytest.approx(row.sets[0])
    assert 0 < row.times[0] <= row.time <= row.times[1]
    assert row.batch < 1e-4


def test_what_fails_or_stays_dense_says_so(tried: Any) -> None:
    _, _, rows, failures = tried
    assert {row.system for row in rows} == {"TaylorSeer"}
    said = {each["system"]: each["error"] for each in failures}
    assert said["broken"] == "AssertionError: six blocks are too few"
    assert said["sleeper"] == "computes everything: nothing was reused"
    assert "make peers" in said["DBCache"]


def test_what_was_measured_is_not_measured_again(tried: Any) -> None:
    folder, run, rows, _ = tried
    again = PeerRun("digits", TINY, folder, no_progress)
    forbidden = replace(TAYLORSEER, denoiser=_raising("").denoiser)
    again.__dict__["task"] = run.task
    assert [each for _, found, _ in again.run([forbidden]) for each in found] == rows


def _row(system: str, package: str, rmse: float, **changed: Any) -> dict[str, Any]:
    row = {
        "model": "digits", "steps": 4, "system": system, "package": package, "budget": 0.6,
        "setting": '{"max_order": 2}', "compute": 0.55, "rmse": rmse, "sets": [rmse, rmse], "median": rmse,
        "time": 0.6, "times": [0.5, 0.7], "batch": 1e-6, "images": 8,
    }  # fmt: skip
    return {**row, **changed}


def test_the_page_says_who_is_ahead_and_what_failed(tmp_path: Path) -> None:
    rows: Sequence[Any] = [
        _row("plan", "lazy_compile", 0.03),
        _row("TaylorSeer", "diffusers", 0.02),
        _row("TaylorSeer", "diffusers", 0.04, setting='{"max_order": 1}'),
        _row("MagCache", "diffusers", 0.05, time=None, times=[], batch=None),
    ]
    failure = {"model": "digits", "steps": 4, "system": "SeaCache", "package": "diffusers", "error": "never acts"}
    ((ours, peer),) = contests(rows)
    assert (ours["system"], peer["rmse"]) == ("plan", 0.02)
    page = markdown({"rows": rows, "failures": [failure]})
    assert "| digits | 4 | 60% | 0.0300 (plan) | 55.0% | 0.0200 (TaylorSeer) | 55.0% | **1.50** |" in page
    assert "- SeaCache (diffusers): never acts" in page
    assert "0.0400" not in page
    write({"rows": rows, "failures": [failure]}, tmp_path)
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model 'dogs' to measure; expected all or one of digits, scenes"):
        measure_peers("dogs", [4], {}, tmp_path)
    with pytest.raises(ConfigError, match=r"no system 'TeaTime' to measure; expected one of TaylorSeer"):
        measure_peers("digits", [4], {}, tmp_path, names=["TeaTime"])


def test_what_was_measured_of_other_systems_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = JudgedRow("TaylorSeer", "diffusers", 0.6, "{}", 0.5, 0.02, [0.02], 0.02, 0.6, [0.6, 0.6], 0.0)

    def measured(*_: Any, systems: Sequence[System], **__: Any) -> Any:
        (system,) = systems
        yield system, [replace(row, system=system.name)], None
        assert json.loads((tmp_path / "peers.json").read_text())["rows"][-1]["system"] == system.name

    monkeypatch.setattr(peers_report, "measure", measured)
    measure_peers("digits", [4], {}, tmp_path, names=["TaylorSeer"])
    measure_peers("digits", [4], {}, tmp_path, names=["MagCache"])
    found = measure_peers("digits", [4], {"samples": 5}, tmp_path, names=["TaylorSeer"])
    assert [(each["system"], each["images"]) for each in found["rows"]] == [("MagCache", 64), ("TaylorSeer", 5)]
