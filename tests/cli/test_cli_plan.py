"""``lazy-compile plan``: limits, dry runs, checkpoints, and pipelines with prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import lazy_compile
from lazy_compile.cli import pipelines
from lazy_compile.cli.models import NamedModel, choose_scheduler
from lazy_compile.errors import ArtifactError, ConfigError
from support.command_line import answer, refusal
from support.diffusers_pipelines import WORDS, dit, normal, sd3

MODEL = ["support.factories:tiny_dit", "--sampler", "support.factories:euler", "--steps", 4, "--lazy-ratio", 0.5]


def test_a_dry_run_says_what_a_plan_takes_and_writes_nothing(tmp_path: Path) -> None:
    values = answer("plan", *MODEL, "--dry-run", "--max-memory", "2GB", "--checkpoint", tmp_path / "none")
    assert values["steps"] == 4
    assert values["model calls"] > 100
    assert 0 < values["GB on the device"] < 2
    assert not list(tmp_path.iterdir())
    assert answer("plan", *MODEL, "--dry-run", "--calls", 40)["model calls"] == 40


def test_a_plan_within_calls_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    command = ["plan", *MODEL, "--calls", 40, "--checkpoint", tmp_path / "kept", "--output"]
    first = answer(*command, tmp_path / "first")
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    assert len(written) > 3
    again = answer(*command, tmp_path / "again")
    assert again["should_compute"] == first["should_compute"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()} == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one, or --dry-run"),
        (["--output", "x", "--max-memory", "lots"], "no size of memory"),
        (["--output", "x", "--call", "height=8"], "give --prompts too"),
        (["--dry-run", "--import", "x"], "search nothing"),
        (["--output", "x", "--max-memory", "1kB"], "of memory beside the model"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(arguments: list[str], message: str) -> None:
    assert message in refusal(2, "plan", *MODEL, *arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline and its prompts."""

    def encode_prompt(pipe: Any, prompt: list[str], **options: Any) -> tuple[torch.Tensor, ...]:
        words, pooled = (
            torch.cat([normal(1, *size, seed=len(text)) for text in prompt]) for size in ((WORDS, 12), (10,))
        )
        return words, torch.zeros_like(words), pooled, torch.zeros_like(pooled)

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(pipelines, "load_pipeline", lambda *_: sd3(layers=1).pipe)  # its text encoders are made up
    (tmp_path / "prompts.txt").write_text("a lighthouse\n\na cat\n")
    return tmp_path


def test_a_pipeline_is_planned_with_its_prompts(folder: Path) -> None:
    sizes = ["--call", "height=8", "--call", "width=8"]
    command = ["plan", folder / "pipe", "--prompts", folder / "prompts.txt", "--steps", 6, "--lazy-ratio", 0.5, *sizes]
    assert answer(*command, "--dry-run")["transformer: steps"] == 6
    values = answer(*command, "--calls", 60, "--output", folder / "plan")
    assert values["transformer"]["lazy_ratio"] >= 0.5
    pipe = lazy_compile.load(folder / "plan", sd3(layers=1).pipe)
    assert (
        pipe.transformer.policy.schedule.should_compute.astype(int).tolist() == values["transformer"]["should_compute"]
    )


def test_prompts_need_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    budget = ["--lazy-ratio", 0.5, "--output", "x"]
    refused = refusal(2, "plan", *MODEL, "--prompts", tmp_path / "prompts.txt", "--output", "x")
    assert "--sampler is for single models" in refused
    refused = refusal(2, "plan", tmp_path, "--prompts", tmp_path / "prompts.txt", *budget)
    assert "holds no pipeline" in refused
    with pytest.raises(ArtifactError, match="holds no prompt"):
        pipelines.read_prompts(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is not NAME=VALUE"):
        pipelines.call_arguments(["height"])
    assert pipelines.call_arguments(["height=8", "cfg=[1.0, 2]", "mode=fast"]) == {
        "height": 8, "cfg": [1.0, 2], "mode": "fast"
    }  # fmt: skip


def test_a_pipeline_is_read_from_its_folder(tmp_path: Path) -> None:
    dit().pipe.save_pretrained(tmp_path)
    assert isinstance(pipelines.load_pipeline(str(tmp_path)), diffusers.DiTPipeline)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot load the pipeline"):
        pipelines.load_pipeline(str(tmp_path))


def named(name: str) -> NamedModel:
    kind = type(name, (nn.Module,), {"__module__": "diffusers.models.somewhere"})
    return NamedModel("x", kind())


def test_a_default_sampler_fits_the_model_or_is_refused() -> None:
    assert isinstance(
        choose_scheduler(named("FluxTransformer2DModel"), None), diffusers.FlowMatchEulerDiscreteScheduler
    )
    assert isinstance(choose_scheduler(named("DiTTransformer2DModel"), None), diffusers.DDIMScheduler)
    with pytest.raises(ConfigError, match="predicts a velocity, which DDIM takes for noise"):
        choose_scheduler(named("FluxTransformer2DModel"), "ddim")
    with pytest.raises(ConfigError, match="how StrangeTransformer is sampled is not known here"):
        choose_scheduler(named("StrangeTransformer"), None)
