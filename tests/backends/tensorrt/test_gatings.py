"""What each gating and group size becomes in an engine: jumps, host copies, and kernels on either side."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.tensorrt.build import build_engine, build_engines
from lazy_compile.backends.tensorrt.check import EngineStructure
from lazy_compile.backends.tensorrt.config import BuildConfig
from support.slow import slow_but

RTX = BuildConfig(flavor="rtx")

Compiled = Callable[..., LazyModule]


def built(lazy: LazyModule, folder: Path, gating: str, group: int | str) -> EngineStructure:
    export_onnx(lazy, folder / "m.onnx", gating=gating, group=group, dynamic=False)
    return build_engine(folder / "m.onnx", folder / "m.engine", RTX).structure


@pytest.fixture(scope="module")
def each_branch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LazyModule, str], EngineStructure]:
    """``each_branch(lazy, "input")``: the engine in which every branch has a gate of its own; built once."""
    made: dict[str, EngineStructure] = {}

    def get(lazy: LazyModule, gating: str) -> EngineStructure:
        if gating not in made:
            made[gating] = built(lazy, tmp_path_factory.mktemp(gating), gating, 1)
        return made[gating]

    return get


CONDITIONALS = {1: 4, 2: 2, "block": 2, 4: 1}
"""How many there are of each group size."""


@pytest.mark.parametrize(
    ("reuse", "group"), slow_but([("last", "block"), ("linear", 2)], product(("last", "linear"), CONDITIONALS))
)
def test_a_group_is_one_jump(compiled: Compiled, tmp_path: Path, reuse: str, group: int | str) -> None:
    structure = built(compiled("dit", reuse=reuse), tmp_path, "predicate", group)
    assert structure.problems == ()
    assert len(structure.branches) == structure.host_copies == CONDITIONALS[group]
    assert structure.heavy_inside > structure.heavy_always


@pytest.mark.parametrize(
    ("toy", "granularity", "conditionals"),
    slow_but([("mmdit", "block", 2)], [("dit", "model", 1), ("mmdit", "block", 2)]),
)
def test_a_span_is_one_jump(compiled: Compiled, tmp_path: Path, toy: str, granularity: str, conditionals: int) -> None:
    lazy = compiled(toy, reuse="taylor", granularity=granularity)
    structure = built(lazy, tmp_path, "predicate", 1)
    assert structure.problems == ()
    assert len(structure.branches) == structure.host_copies == conditionals
    assert structure.heavy_inside > structure.heavy_always


def test_predicates_are_read_one_by_one_and_booleans_all_before_the_first_jump(
    compiled: Compiled, each_branch: Callable[[LazyModule, str], EngineStructure]
) -> None:
    lazy = compiled("dit", reuse="last")
    counts = {gating: each_branch(lazy, gating) for gating in ("predicate", "input")}
    assert {gating: found.host_copies for gating, found in counts.items()} == {"predicate": 4, "input": 4}
    before = {gating: found.host_copies_before_first_branch for gating, found in counts.items()}
    assert before == {"predicate": 1, "input": 4}


def test_a_fixed_schedule_has_no_jump_and_half_the_kernels(
    compiled: Compiled, each_branch: Callable[[LazyModule, str], EngineStructure], tmp_path: Path
) -> None:
    lazy = compiled("dit", reuse="last")
    table = np.ones((4, 4), dtype=bool)
    table[1, :2] = table[3, :2] = table[2, 2:] = False
    lazy.policy = Scheduled(CacheSchedule(table))
    gated = each_branch(lazy, "input")
    export_onnx(lazy, tmp_path / "onnx", gating="schedule", dynamic=False)
    reports = build_engines(tmp_path / "onnx", tmp_path / "engines", RTX)
    assert len(reports) == 3, "equal rows share an engine"
    heavy = [sum(layer.is_heavy for layer in report.structure.layers) for report in reports]
    assert all((len(report.structure.branches), report.structure.host_copies) == (0, 0) for report in reports)
    dense, *half = heavy
    skipped = [dense - count for count in half]
    inside = sum(layer.is_heavy for branch in gated.branches for layer in branch.compute)
    assert skipped == [inside // 2, inside // 2]
    masks = ScheduleVariants.load(tmp_path / "engines")
    assert masks.schedule == lazy.policy.schedule
    assert [file.suffix for file in masks.files.values()] == [".engine"] * 3
    again = build_engines(tmp_path / "onnx", tmp_path / "engines", RTX)
    assert all(report.skipped for report in again)
