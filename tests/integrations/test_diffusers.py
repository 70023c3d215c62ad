"""diffusers' own folders and schedulers, as the command line meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile.cli.models import load_lazy, load_model, load_sampler
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.integrations.diffusers import SchedulerSampler, load_denoiser, make_scheduler


def small_dit() -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


def call_of_dit() -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(2, 1, 4, 4),
        "timestep": torch.zeros(2, dtype=torch.long),
        "class_labels": torch.zeros(2, dtype=torch.long),
    }


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    small_dit().save_pretrained(folder / "transformer")
    diffusers.DDIMScheduler(num_train_timesteps=500).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("name", ["ddim", "flow-match"])
def test_noise_depends_on_the_seed_alone(name: str) -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    sample = SchedulerSampler(make_scheduler(name), {"x": torch.zeros(2, 3, 4), "t": torch.zeros(2)}, steps=3)
    sample(denoiser, 1), sample(denoiser, 1), sample(denoiser, 2)
    assert len(seen) == 9
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[6])


def test_time_falls_and_other_arguments_keep_their_value() -> None:
    times, labels = [], []

    def denoiser(sample: Tensor, timestep: Tensor, label: int) -> tuple[Tensor]:
        times.append(timestep.tolist())
        labels.append(label)
        return (0 * sample,)

    example = {"sample": torch.zeros(2, 1, 4, 4), "timestep": torch.zeros(2, dtype=torch.long), "label": 7}
    SchedulerSampler(make_scheduler("ddim"), example, steps=4)(denoiser, 0)
    assert times == [[750, 750], [500, 500], [250, 250], [0, 0]]
    assert labels == [7] * 4


def test_learned_variance_is_left_out() -> None:
    sample = SchedulerSampler(make_scheduler("ddim"), call_of_dit(), steps=2)
    assert sample(small_dit(), 0).shape == (2, 1, 4, 4)


def test_a_lazy_model_is_sampled_like_the_original() -> None:
    model = small_dit()
    sample = SchedulerSampler(make_scheduler("ddim"), call_of_dit(), steps=5)
    lazy = lazy_compile.transform(model, call_of_dit())
    assert torch.equal(sample(lazy, 0), sample(model, 0))
    assert lazy.stats.evaluated.shape == (5, 2)


def test_sampler_says_which_argument_it_misses() -> None:
    with pytest.raises(ConfigError, match=r"the timestep argument is None; the tensors .* are x: name one"):
        SchedulerSampler(make_scheduler("ddim"), {"x": torch.zeros(2, 3, 4), "scale": 1.0})
    with pytest.raises(ConfigError, match="the sample argument is 'z'"):
        SchedulerSampler(make_scheduler("ddim"), {"x": torch.zeros(2, 3, 4)}, sample_argument="z")


def test_unknown_scheduler_and_number_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="the scheduler is 'dpm'; expected one of ddim, flow-match"):
        make_scheduler("dpm")
    with pytest.raises(ConfigError, match="steps is 0; use 1 or more"):
        SchedulerSampler(make_scheduler("ddim"), call_of_dit(), steps=0)


def test_a_denoiser_without_a_tensor_is_refused() -> None:
    sample = SchedulerSampler(make_scheduler("ddim"), {"x": torch.zeros(2, 3, 4), "t": torch.zeros(2)})
    with pytest.raises(ConfigError, match="returned dict without a tensor"):
        sample(lambda x, t: {}, 0)


def test_a_pipeline_folder_gives_its_model_and_its_scheduler(pipeline_folder: Path) -> None:
    shapes = ["hidden_states:2x1x4x4", "timestep:2:int64,class_labels:2:int64"]
    named = load_model(f"{pipeline_folder}#transformer", shapes)
    assert type(named.model) is diffusers.DiTTransformer2DModel
    assert not named.model.training
    lazy = load_lazy(named, None, ())
    sampler = load_sampler(None, named, lazy, steps=2)
    assert isinstance(sampler, SchedulerSampler)
    assert type(sampler.scheduler) is diffusers.DDIMScheduler
    assert sampler.scheduler.config.num_train_timesteps == 500
    assert torch.isfinite(sampler(lazy, 0)).all()


def test_a_folder_without_a_model_names_the_folders_that_have_one(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no config\.json; it has transformer: name one as .*#transformer"):
        load_denoiser(pipeline_folder)
    with pytest.raises(ArtifactError, match="name a diffusers folder"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"_class_name": "NoSuchModel"}, "names the class 'NoSuchModel', which diffusers .* has not as a model"),
        ({"_class_name": "DDIMScheduler"}, "has not as a model"),
        ({}, "names no _class_name"),
        ([], "names no _class_name"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, config: Any, complaint: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=complaint):
        load_denoiser(tmp_path)


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    small_dit().save_config(tmp_path)
    with pytest.raises(ArtifactError, match="cannot load DiTTransformer2DModel from") as error:
        load_denoiser(tmp_path)
    assert "\n" not in str(error.value)
