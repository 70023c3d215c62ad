"""The page of questions: every answer is there, and numbers mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazy_compile.bench.ablations import Questions, QuestionSettings, _regress
from lazy_compile.bench.ablations_report import ask_all
from lazy_compile.planning.search import SearchOptions

QUICK = SearchOptions(rounds=0, swaps=2)
TINY = QuestionSettings(
    steps=4, seeds=1, samples=4, batch=2, numbers_of_steps=(4,), lazy_ratios=(0.3,), transfers=(3, 4),
    regression_seeds=4, search=QUICK, quick_search=QUICK,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    ask_all(folder, TINY)
    return folder


@pytest.mark.slow
def test_what_was_answered_is_not_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "questions.json").read_text()
    for name in ("thresholds", "kinds", "frozen", "worth", "gates", "fewer_steps", "transfers"):
        monkeypatch.setattr(Questions, name, None)
    ask_all(folder, TINY)
    assert (folder / "questions.json").read_text() == before


@pytest.fixture
def answers(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "questions.json").read_text())
    return values


@pytest.mark.slow
def test_a_higher_threshold_computes_more(answers: dict[str, Any]) -> None:
    spent = [row["compute_ratio"] for row in answers["thresholds"]]
    assert spent == sorted(spent)
    assert [round(row["threshold"], 2) for row in answers["thresholds"]][::4] == [0.3, 0.5, 0.7]


@pytest.mark.slow
def test_attention_and_mlps_save_together_what_they_save_apart(answers: dict[str, Any]) -> None:
    saved = {row["lazy"]: 1 - row["compute_ratio"] for row in answers["kinds"] if row["n"] == 2}
    assert saved["both"] == pytest.approx(saved["attention"] + saved["MLP"])
    assert 0 < saved["attention"] < saved["MLP"]


@pytest.mark.slow
def test_lazy_steps_cost_no_more_than_the_fewer_they_are_compared_with(answers: dict[str, Any]) -> None:
    (row,) = answers["steps"]
    assert row["compute_ratio"] <= row["fewer"] / row["steps"]
    assert row["rmse"] > 0
    moved, _ = answers["transfers"]
    assert moved["ratio_moved"] == pytest.approx(moved["ratio_own"], abs=0.2)
    assert (moved["ratio_joined"], moved["rmse_joined"]) == (moved["ratio_own"], moved["rmse_own"])


@pytest.mark.slow
def test_the_page_shows_every_answer_and_its_pictures(folder: Path) -> None:
    page = (folder / "questions.md").read_text()
    pictures = {f"questions/{path.name}" for path in (folder / "questions").iterdir()}
    assert len(pictures) == 3
    assert all(picture in page for picture in pictures)
    assert page.count("## ") == 8


def test_a_regression_foretells_what_depends_on_its_features_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    features, trusted, out = generator.normal(size=(200, 5)), np.ones(200), np.arange(200) % 4 == 0
    linear, noise = 3 * features[:, 0] + 1, generator.normal(size=200)
    for change, foreseen in ((linear, True), (noise, False)):
        predicted, mean = _regress(features, change, trusted, out, 5)
        better = ((change[out] - predicted) ** 2).sum() < 0.8 * ((change[out] - mean) ** 2).sum()
        assert better == foreseen
