"""Exported spans: one ``If`` each, streams that are restored inside, and extrapolation of any order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.open_runner import open_runner
from support.toy_models import TOYS, trajectory

Compiled = Callable[..., LazyModule]

STEPS, TOLERANCE = 8, 1e-5


def largest_difference(lazy: LazyModule, path: Path, toy: str) -> float:
    """Per unit of the largest value, over a trajectory."""
    engine = EngineDenoiser(open_runner(path))
    calls = trajectory(TOYS[toy], 2, steps=STEPS)
    with torch.no_grad():
        pairs = [(engine(**arguments), lazy(**arguments)) for arguments in calls]
    np.testing.assert_array_equal(engine.stats.reuse_table, lazy.stats.reuse_table)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("toy", "granularity", "gating", "options", "conditionals"),
    [
        ("mmdit", "model", "predicate", {"reuse": "last"}, 1),
        ("mmdit", "block", "input", {"reuse": "taylor"}, 2),
        slow("mmdit", "block", "input", {"group": 2}, 1),
        slow("mmdit", "block", "schedule", {"reuse": "taylor", "order": 3}, 0),
        ("uvit", 2, "input", {}, 2),
        ("parallel", "block", "schedule", {}, 0),
    ],
)
def test_exported_spans_follow_pytorch(
    compiled: Compiled, tmp_path: Path, toy: str, granularity: object, gating: str, options: dict, conditionals: int
) -> None:
    lazy = compiled(toy, granularity=granularity, batch_rule="all_reuse", **options)
    branches = len(lazy.branches)
    table = CacheSchedule.random(0.5, STEPS, branches, seed=3).tied(lazy.graph.leaders(lazy.lazy_config.group))
    if gating == "schedule":  # one file for each distinct row
        table = CacheSchedule.every(2, STEPS, branches)
    slopes = np.random.default_rng(0).uniform(0.5, 1.5, table.should_compute.shape)
    slopes[:] = slopes[:, :1]
    lazy.policy = Scheduled(CacheSchedule(table.should_compute, slopes))
    report = export_onnx(lazy, tmp_path / ("m" if gating == "schedule" else "m.onnx"), gating=gating, dynamic=False)
    assert report.if_nodes == conditionals
    assert report.heavy_ops_outside_if == ()
    assert largest_difference(lazy, report.path, toy) < TOLERANCE
    assert 0.3 < lazy.stats.lazy_ratio < 0.7
