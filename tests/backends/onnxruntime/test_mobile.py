"""The .ort format: exported by the command line, and run along a trajectory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
from lazy_compile.backends.open_runner import open_runner
from lazy_compile.cli.app import app
from lazy_compile.cli.models import load_lazy, load_model
from lazy_compile.errors import ArtifactError
from support.factories import euler


def export(*arguments: object) -> Any:
    return CliRunner().invoke(
        app, ["export", "support.factories:tiny_dit", "--target", "ort-mobile", *map(str, arguments)]
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "model.ort"
    done = export("--output", path, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["path"], report["if_nodes"], report["heavy_ops_outside_if"]) == (str(path), 4, [])
    assert report["bytes"] == path.stat().st_size
    assert [each.name for each in path.parent.iterdir()] == ["model.ort"]
    return path


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return load_lazy(load_model("support.factories:tiny_dit"), None, ())


@torch.no_grad()
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_it_follows_pytorch_and_skips(file: Path, lazy: LazyModule, interval: int) -> None:
    lazy.reset_stats()
    denoiser = EngineDenoiser(open_runner(file))
    results = []
    for model in (lazy, denoiser):
        model.policy = Scheduled(CacheSchedule.every(interval, 4, len(lazy.branches)))
        results.append(euler(steps=4)(model, 0))
    assert torch.allclose(*results, atol=1e-4)
    assert denoiser.stats.lazy_ratio == lazy.stats.lazy_ratio == 1 - 1 / interval


def test_what_is_no_single_file_is_refused(tmp_path: Path) -> None:
    for options in (["--output", tmp_path / "m.onnx"], ["--output", tmp_path / "m.ort", "--gating", "schedule"]):
        done = export(*options)
        assert done.exit_code == 2
        assert "--target ort-mobile writes one .ort file; seen" in done.stderr


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    with pytest.raises(ArtifactError, match=r"cannot read .*m\.onnx as ONNX"):
        convert_to_ort(tmp_path / "m.onnx", tmp_path / "m.ort")
    assert not (tmp_path / "m.ort").exists()
