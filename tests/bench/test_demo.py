"""The demonstration in small: what it writes has the promised form, and its baselines get what they are promised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lazy_compile.bench.tasks import digits
from lazy_compile.bench.tasks.training import default_checkpoints
from lazy_compile.demo.comparison import FIRST_EVALUATION_SEED, DemoSettings
from lazy_compile.demo.run import run_demo
from lazy_compile.planning.search import SearchOptions
from lazy_compile.runtime.artifact import read

SMALL = DemoSettings(
    steps=5,
    targets=(0.4,),
    seeds=2,
    samples=20,
    reference_steps=8,
    plan_batch=2,
    calibration_batch=2,
    iterations=1,
    search=SearchOptions(rounds=0),
    pictures=0,
)
METHODS = ["dense", "fora2", "fora2_last", "lazy", "random", "planned", "ddim"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, SMALL, progress=False)
    return folder


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


@pytest.fixture
def rows(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in summary["rows"]}


def test_summary_has_the_promised_form(summary: dict[str, Any]) -> None:
    assert list(summary) == [
        "model",
        "steps",
        "rows",
        "decisions_varying_between_samples",
        "onnx",
        "pictures",
        "digest",
    ]
    assert (type(summary["model"]), summary["steps"]) == (str, 5)
    assert [row["method"] for row in summary["rows"]] == METHODS
    for row in summary["rows"]:
        assert row["seeds"] == 2
        for name in ("lazy_ratio", "compute_ratio", "rmse_dense", "rmse_reference", "frechet"):
            assert math.isfinite(row[name])
        for name in ("rmse_dense", "rmse_reference", "frechet"):
            assert row[f"{name}_std"] >= 0


def test_ratios_are_what_the_methods_spend(rows: dict[str, dict[str, Any]]) -> None:
    assert (rows["dense"]["lazy_ratio"], rows["dense"]["compute_ratio"], rows["dense"]["rmse_dense"]) == (0, 1, 0)
    assert rows["fora2"]["lazy_ratio"] == pytest.approx(0.4)
    assert rows["random"]["lazy_ratio"] == pytest.approx(rows["lazy"]["lazy_ratio"], abs=0.02)
    assert rows["lazy"]["compute_ratio"] < 1 - 0.8 * rows["lazy"]["lazy_ratio"]


def test_fewer_steps_get_no_less_compute_than_the_gates(rows: dict[str, dict[str, Any]]) -> None:
    ddim, lazy = rows["ddim"], rows["lazy"]
    assert ddim["compute_ratio"] == ddim["sampler_steps"] / 5
    assert lazy["compute_ratio"] <= ddim["compute_ratio"] < lazy["compute_ratio"] + 1 / 5
    assert ddim["target"] == lazy["target"] == 0.4


def test_onnx_runtime_follows_pytorch(summary: dict[str, Any], folder: Path) -> None:
    onnx = summary["onnx"]
    assert onnx["if_nodes"] == onnx["branches"] == 12
    assert onnx["heavy_ops_outside_if"] == 0
    assert onnx["max_abs_error"] < 1e-4
    assert onnx["decisions_that_differ"] == 0
    assert (folder / "digits.onnx").exists()


def test_everything_promised_is_written_and_nothing_else(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"digits.onnx", "gates-0.4", "report.html", "samples.npz", "summary.json"}
    assert len(read(folder / "gates-0.4").branches) == 12
    page = (folder / "report.html").read_text()
    assert "What is reused" in page
    assert page.count("class=strip ") == len(METHODS) + 1


def test_samples_of_all_methods_start_from_the_same_noise(folder: Path) -> None:
    with np.load(folder / "samples.npz") as samples:
        dense, repeated = samples["images_0"], samples["images_2"]
        assert samples["reuse_1"].tolist() == [[float(step % 2)] * 12 for step in range(5)]
    model = digits.load_or_train_digits_dit(default_checkpoints("digits") / "digits_dit.safetensors")
    again = SMALL.sampler(batch=20)(model, seed=FIRST_EVALUATION_SEED)
    assert torch.equal(torch.from_numpy(dense), again)
    assert np.abs(dense - repeated).max() > 0


def test_checkpoints_lie_in_the_users_cache_outside_a_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "lazy_compile" / "bench" / "tasks" / "training.py"
    monkeypatch.setattr("lazy_compile.bench.tasks.training.__file__", str(installed))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_checkpoints("digits") == tmp_path / "cache" / "lazy_compile" / "digits"
