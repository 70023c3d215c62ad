"""Pictures of captions: which strips are drawn, from which noise, and what is said of them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from lazy_compile.bench import pictures
from lazy_compile.bench.pictures import PlanSettings, Strip, lazy_model, schedules_of, strips
from lazy_compile.bench.tasks import emoji, registry
from lazy_compile.bench.tasks.registry import Subject
from lazy_compile.demo.run import draw_pictures
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import no_progress
from lazy_compile.runtime.module import LazyModule

IMAGES = 2


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The emoji subject with a model of one narrow block in the place of the trained one."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = diffusers.PixArtTransformer2DModel(
            sample_size=64, patch_size=16, in_channels=3, out_channels=3, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, cross_attention_dim=16, caption_channels=emoji.CAPTION_CHANNELS,
        ).eval()  # fmt: skip
        patch.setattr(emoji, "load_emoji_pixart", lambda path: tiny)
        return registry.emoji_subject(batch=1)


@pytest.fixture(scope="module")
def lazy(subject: Subject) -> LazyModule:
    return lazy_model(subject)


@pytest.fixture(scope="module")
def drawn(subject: Subject, lazy: LazyModule) -> Sequence[Strip]:
    branches = len(lazy.branches)
    schedules = {0.35: CacheSchedule.every(3, 6, branches), 0.5: CacheSchedule.every(2, 6, branches)}
    return strips(subject, lazy, schedules, IMAGES)


def test_each_schedule_stands_beside_as_many_dense_steps_as_it_costs(drawn: Sequence[Strip]) -> None:
    assert [strip.method for strip in drawn] == ["dense", "planned", "ddim", "planned", "ddim"]
    for planned, fewer in ((drawn[1], drawn[2]), (drawn[3], drawn[4])):
        assert (planned.steps, fewer.compute_ratio) == (6, fewer.steps / 6)
        assert planned.compute_ratio <= fewer.compute_ratio + pictures.FEWER_SLACK / 6 < planned.compute_ratio + 1 / 3
    assert drawn[3].compute_ratio < drawn[1].compute_ratio


def test_all_start_from_the_same_noise_and_are_held_against_the_dense_ones(
    subject: Subject, drawn: Sequence[Strip]
) -> None:
    again = subject.sampler(6, IMAGES)(subject.model, pictures.FIRST_SAMPLING_SEED)  # type: ignore[arg-type]
    assert torch.equal(drawn[0].images, again)
    assert drawn[0].scores["rmse_dense"] == drawn[0].scores["perceptual"] == 0
    for strip in drawn[1:]:
        assert 0 < strip.scores["rmse_dense"] < 1
        assert strip.scores["rmse_dense"] == pytest.approx(
            float((strip.images - again).square().mean().sqrt()), rel=1e-4
        )


def test_schedules_are_planned_once_at_the_cost_of_whole_steps(
    subject: Subject, lazy: LazyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "WHOLE_STEPS", {0.5: 2})
    monkeypatch.setattr(pictures, "STEPS", 4)
    first = schedules_of(subject, lazy, tmp_path, PlanSettings(images=1, calls=32))
    macs = [branch.macs for branch in lazy.branches]
    share = sum(macs) / lazy.graph.total_macs
    assert first[0.5].compute_ratio(macs, lazy.graph.total_macs) <= 1 - share / 2 + 1e-3
    monkeypatch.setattr(pictures, "plan", None)
    assert schedules_of(subject, lazy, tmp_path, PlanSettings())[0.5] == first[0.5]


def test_it_is_written_as_pictures_figures_and_a_page(
    subject: Subject, lazy: LazyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {ratio: CacheSchedule.every(n, 4, len(lazy.branches)) for ratio, n in ((0.7, 2), (0.5, 3), (0.35, 4))}
    monkeypatch.setattr(pictures, "emoji_subject", lambda: subject)
    monkeypatch.setattr(pictures, "lazy_model", lambda subject: lazy)
    monkeypatch.setattr(pictures, "schedules_of", lambda *args: every)
    rows = pictures.measure_pictures(tmp_path, IMAGES)
    written = json.loads((tmp_path / "emoji.json").read_text())
    assert written == {"captions": list(subject.captions(IMAGES)), "rows": rows}
    assert [row["method"] for row in rows] == ["dense", *["planned", "ddim"] * 3]
    assert (tmp_path / "emoji.md").read_text().count("**planned schedule**") == 3
    tall, short = (Image.open(io.BytesIO((tmp_path / name).read_bytes())) for name in ("emoji.png", "emoji_50.png"))
    assert tall.width == short.width
    assert tall.height - short.height == 4 * (pictures.SIDE + pictures.GAP)
    assert np.asarray(short).std() > 10


def test_the_demonstration_draws_them_or_says_why_not(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Console(file=io.StringIO(), width=400)
    monkeypatch.setattr("lazy_compile.demo.run.default_checkpoints", lambda model: tmp_path)
    assert draw_pictures(IMAGES, said, no_progress, subject) == ([], None)
    assert "no pictures of emoji" in said.file.getvalue()  # type: ignore[attr-defined]
    schedule = tmp_path / "schedules" / "50.json"
    schedule.parent.mkdir()
    schedule.write_text(json.dumps(CacheSchedule.every(2, 4, 3).to_json()))
    drawn, record = draw_pictures(IMAGES, said, no_progress, subject)
    assert record is not None
    assert (
        [row["method"] for row in record["rows"]] == [strip.method for strip in drawn] == ["dense", "planned", "ddim"]
    )
    assert record["captions"] == list(subject.captions(IMAGES))


def test_captions_are_those_of_the_rows(subject: Subject) -> None:
    captions = emoji.Captions.load(Path(__file__).parents[2] / "examples" / "emoji" / "emoji_captions.safetensors")
    assert subject.captions(3) == [captions.texts[row] for row in (0, 121, 242)]
