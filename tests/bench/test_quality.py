"""The comparison of methods at equal compute: what is in it, and that its scores mean what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lazy_compile.bench.quality import Quality, QualitySettings, rmse, ssim
from lazy_compile.bench.quality_report import best_rule, comparisons, measure_all, rules_at
from lazy_compile.bench.tasks.registry import digits_subject
from lazy_compile.errors import ConfigError
from lazy_compile.planning.search import SearchOptions
from lazy_compile.progress import no_progress

TINY: dict[str, Any] = {
    "steps": 4, "ratios": (0.6,), "sampling_seeds": 1, "calibration_seeds": 1, "samples": 4, "calibration_batch": 2,
    "reference_steps": 5, "gate_batch": 2, "oracle_samples": 2,
    "search": SearchOptions(rounds=0, swaps=2),
}  # fmt: skip


@pytest.mark.slow
def test_every_method_is_scored_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ("compute_ratio", "rmse_dense", "spread", "median_dense", "rmse_reference", "frechet", "accuracy")
    texts = {"model": "another", "sampler": "", "method": "dense", "family": "dense", "reuse_arm": ""}
    another = {**texts, "steps": 4, "seeds": 1, "budget": None, **dict.fromkeys(numbers, 1.0)}
    (tmp_path / "quality.json").write_text(json.dumps({"rows": [another, {**another, "model": "digits DiT"}]}))
    kept, *rows = measure_all("digits", TINY, tmp_path)
    assert kept == another
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == [another, *rows]
    assert "| **plan** | fitted |" in (tmp_path / "quality.md").read_text()
    assert "<img src=" in (tmp_path / "quality.html").read_text()
    dense, *others = rows
    assert (dense["rmse_dense"], dense["compute_ratio"], dense["ssim"]) == (0.0, 1.0, pytest.approx(1.0))
    names = {row["method"] for row in rows}
    assert {"fewer steps", "FORA n=2", "random", "SmoothCache", "TeaCache", "First-Block-Cache"} <= names
    assert {"FORA n=2, TaylorSeer", "evenly spread, TaylorSeer", "plan without slopes"} <= names
    assert {"DPM-Solver++ 2M", "gates", "gates, frozen majority", "oracle for each sample"} <= names
    assert {row["family"] for row in rows} == {"dense", "baseline", "planned", "learned", "oracle"}
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(row["rmse_dense"] > 0 for row in others)
    evenly = next(row for row in rows if (row["method"], row["reuse_arm"]) == ("evenly spread", "linear"))
    planned = next(row for row in rows if row["method"] == "plan")
    assert planned["compute_ratio"] <= 0.6 <= evenly["compute_ratio"]
    oracle = next(row for row in rows if row["method"] == "oracle for each sample")
    assert oracle["compute_ratio"] <= 0.6
    assert [line[:3] for line in comparisons(rows)] == [
        ["digits DiT", "60%", "**plan**"],
        ["digits DiT", "60%", "gates"],
    ]
    monkeypatch.setattr(Quality, "row", None)
    assert measure_all("digits", TINY, tmp_path) == [another, *rows]
    with pytest.raises(TypeError):
        measure_all("digits", {**TINY, "samples": 5}, tmp_path)


def test_without_gradient_there_are_plans_and_no_gates() -> None:
    quality = Quality(digits_subject(), replace(QualitySettings(**TINY), learned=False), None, no_progress)
    assert {method.family for method in quality.methods()} == {"dense", "baseline", "planned"}


def test_the_best_rule_is_one_that_can_be_afforded() -> None:
    rules = [{"compute_ratio": ratio, "rmse_dense": error} for ratio, error in ((0.7, 1.0), (0.5, 2.0), (0.4, 3.0))]
    assert best_rule(rules, 0.55) is rules[1]
    assert best_rule(rules, 0.3) is None


def test_between_two_rules_error_falls_as_a_power_of_compute() -> None:
    rules = [
        {"compute_ratio": ratio, "rmse_dense": error} for ratio, error in ((0.25, 0.04), (0.5, 0.02), (0.9, 0.019))
    ]
    assert rules_at(rules, 0.25) == pytest.approx(0.04)
    assert rules_at(rules, 0.4) == pytest.approx(0.01 / 0.4)
    assert rules_at(rules, 0.2) is None
    assert rules_at(rules, 0.95) is None


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model 'letters' to measure; expected all or one of digits"):
        measure_all("letters", TINY, tmp_path)


def test_similarity_is_one_for_equal_images_and_falls_with_noise() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert ssim(images, images) == pytest.approx(1.0)
    assert 0.5 < ssim(images, images + 0.1 * noise) < 0.999
    assert ssim(images, noise) < 0.3
    assert rmse(images, images + 0.5) == pytest.approx(0.5, rel=1e-6)
