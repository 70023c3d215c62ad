"""A report is one page that needs no other file, and says what its summary says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, LazyModule, Learned, Scheduled
from lazy_compile.digests import verification, with_digest
from lazy_compile.errors import ArtifactError
from lazy_compile.reporting.html_report import SAMPLES, write_report
from support.factories import tiny_dit


def row(method: str, target: float | None = None, steps: int = 20, compute: float = 1.0) -> dict[str, Any]:
    return {
        "method": method,
        "target": target,
        "sampler_steps": steps,
        "lazy_ratio": target or 0.0,
        "compute_ratio": compute,
        **{
            name: value
            for key in ("rmse_dense", "rmse_reference", "frechet")
            for name, value in ((key, 0.5 * compute), (f"{key}_std", 0.01))
        },
        "seeds": 3,
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "model": "a <small> model",
        "steps": 20,
        "rows": [row("dense"), row("ddim", 0.5, steps=11, compute=0.8), row("lazy", 0.5, compute=0.6)],
        "decisions_varying_between_samples": 0.125,
        "onnx": {"branches": 4, "if_nodes": 4, "heavy_ops_outside_if": 0, "max_abs_error": 2.5e-6},
    }


def write(folder: Path, summary: Any) -> Path:
    (folder / "summary.json").write_text(json.dumps(with_digest(summary) if isinstance(summary, dict) else summary))
    return folder / "summary.json"


def page_of(source: Path) -> str:
    return write_report(source, source.parent / "report.html").read_text()


def test_page_says_what_the_summary_says(tmp_path: Path, summary: dict[str, Any]) -> None:
    page = page_of(write(tmp_path, summary))
    assert "a &lt;small&gt; model" in page
    for text in (
        "lazy gates",
        "fewer steps",
        "0.3000 ±0.0100",
        "60.0%",
        "25% lower than with 11 dense steps",
        "2.5e-06",
    ):
        assert text in page


def test_page_needs_no_other_file(tmp_path: Path, summary: dict[str, Any]) -> None:
    page = page_of(write(tmp_path, summary))
    links = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', page)
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in page
    assert "@import" not in page


def test_page_has_figures_for_light_and_dark(tmp_path: Path, summary: dict[str, Any]) -> None:
    page = page_of(write(tmp_path, summary))
    (dark, light) = re.findall(r'src(?:set)?="(data:[^"]*)"', page)
    assert dark != light


def test_samples_beside_the_summary_are_shown(tmp_path: Path, summary: dict[str, Any]) -> None:
    images = np.zeros((3, 1, 8, 8))
    reuse = np.eye(4)[:, :2]
    np.savez(
        tmp_path / SAMPLES,
        branches=np.array(["a", "b"]),
        reference=images,
        images_0=images,
        images_2=images,
        reuse_2=reuse,
    )
    page = page_of(write(tmp_path, summary))
    assert page.count("class=strip ") == 3
    assert "What is reused" in page
    assert "12.5% of the decisions differ between samples" in page


def test_pictures_stand_above_their_captions(tmp_path: Path, summary: dict[str, Any]) -> None:
    row = {"method": "planned", "steps": 20, "compute_ratio": 0.5, "rmse_dense": 0.0123}
    pictures = {"model": "emoji PixArt", "captions": ["fox", "<fire>"], "rows": [{**row, "method": "dense"}, row]}
    np.savez(tmp_path / SAMPLES, picture_0=np.zeros((2, 3, 8, 8)), picture_1=np.ones((2, 3, 8, 8)))
    page = page_of(write(tmp_path, {**summary, "pictures": pictures}))
    assert page.count("class=strip ") == 2
    assert "emoji PixArt, text to image" in page
    assert "&lt;fire&gt;" in page
    assert "20 steps, 50% of the MACs, RMSE to dense 0.0123" in page
    for damaged in ([], {**pictures, "rows": [{}]}, {**pictures, "captions": 3}):
        with pytest.raises(ArtifactError, match="damaged"):
            page_of(write(tmp_path, {**summary, "pictures": damaged or [1]}))


def test_a_folder_with_a_summary_is_its_summary(tmp_path: Path, summary: dict[str, Any]) -> None:
    write(tmp_path, summary)
    assert write_report(tmp_path, tmp_path / "a.html").read_text() == page_of(tmp_path / "summary.json")


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_compile.transform(*tiny_dit())


def test_page_of_a_schedule(lazy: LazyModule, tmp_path: Path) -> None:
    lazy.policy = Scheduled(CacheSchedule.every(2, 6, len(lazy.branches)))
    lazy.save(tmp_path)
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "The schedule" in page
    assert "blocks.1#2" in page


def test_page_of_gates(lazy: LazyModule, tmp_path: Path) -> None:
    lazy.policy = Learned(GateTable.constant(lazy.branches, torch.tensor([900.0, 100.0]), bias=-1.0))
    lazy.save(tmp_path)
    assert "What the gates lean to" in write_report(tmp_path, tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("onnx"), "lacks 'onnx'"),
        (lambda s: s["rows"][1].pop("frechet"), r"rows\[1\] lacks 'frechet'"),
        (lambda s: s["onnx"].pop("if_nodes"), "onnx lacks 'if_nodes'"),
    ],
)
def test_incomplete_summary_is_refused(
    tmp_path: Path, summary: dict[str, Any], change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    change(summary)
    with pytest.raises(ArtifactError, match=complaint):
        page_of(write(tmp_path, summary))
    assert not (tmp_path / "report.html").exists()


def test_summary_that_is_a_list_is_refused(tmp_path: Path) -> None:
    message = r"lacks 'model'; expected a summary\.json as the demo writes it"
    with verification(False), pytest.raises(ArtifactError, match=message):
        page_of(write(tmp_path, []))


def test_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        write_report(tmp_path / "nothing.json", tmp_path / "report.html")
    with pytest.raises(ArtifactError, match=r"holds no lazy\.json"):
        write_report(tmp_path, tmp_path / "report.html")


def test_damaged_samples_are_refused(tmp_path: Path, summary: dict[str, Any]) -> None:
    (tmp_path / SAMPLES).write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ArtifactError, match=r"samples\.npz .*; run the demo again, or delete it"):
        page_of(write(tmp_path, summary))
