"""Pipelines of diffusers as users run them, with lazy denoisers in the place of the original ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import ArtifactError, ConfigError
from support.diffusers_pipelines import CASES, STEPS, Case, dit, flux, pixart, wan
from support.slow import slow_but

# Two of diffusers' schedulers trip over numpy's own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def reuse_every_second_step(case: Case) -> None:
    case.model.policy = Scheduled(CacheSchedule.every(2, STEPS, len(case.model.branches)))


@pytest.mark.parametrize("name", slow_but(["flux", "stable_diffusion"], CASES))
def test_a_pipeline_runs_unchanged_and_then_lazily(name: str) -> None:
    case = CASES[name]()
    dense = case.sample()
    assert lazy_compile.transform(case.pipe) is case.pipe
    assert torch.equal(case.sample(), dense)
    reuse_every_second_step(case)
    lazy = case.sample()
    assert not torch.equal(lazy, dense)
    assert torch.isfinite(lazy).all()
    assert case.model.stats.lazy_ratio == 0.5
    assert case.model.stats.captures == 1


@pytest.mark.slow
def test_a_second_sample_starts_afresh() -> None:
    case = wan()
    lazy_compile.transform(case.pipe)
    case.sample(num_inference_steps=1)
    reuse_every_second_step(case)
    first = case.sample()
    assert torch.equal(case.sample(), first)
    assert case.model.stats.lazy_ratio == 0.5


def test_conditions_that_are_called_apart_do_not_mix() -> None:
    """Without guidance Wan calls once a step; with it twice, each in a cache context of its own."""
    case = wan()
    lazy_compile.transform(case.pipe)
    case.sample(guidance_scale=1.0)
    reuse_every_second_step(case)
    alone = case.sample(guidance_scale=1.0)
    same = {"prompt_embeds": case.arguments["prompt_embeds"], "negative_prompt_embeds": case.arguments["prompt_embeds"]}
    assert torch.allclose(case.sample(guidance_scale=5.0, **same), alone, atol=1e-4)
    assert case.model.stats.lazy_ratio == 0.5


def test_a_prompt_of_another_length_and_more_images_are_followed() -> None:
    case = pixart()
    dense = [case.sample(), case.sample(num_images_per_prompt=2)]
    lazy_compile.transform(case.pipe)
    assert all(map(torch.equal, [case.sample(), case.sample(num_images_per_prompt=2)], dense))
    assert case.model.stats.captures == 1


def test_the_pipeline_still_sees_its_own_class() -> None:
    case = flux()
    original = case.model
    lazy_compile.transform(case.pipe)
    assert isinstance(case.model, diffusers.FluxTransformer2DModel)
    assert type(case.model) is not type(original)
    assert case.pipe.config["transformer"] == ("diffusers", "FluxTransformer2DModel")
    assert (case.model.config, case.model.dtype, case.model.device) == (
        original.config,
        original.dtype,
        original.device,
    )


def test_from_pipe_hands_the_lazy_model_on() -> None:
    case = flux()
    lazy_compile.transform(case.pipe)
    other = diffusers.FluxImg2ImgPipeline.from_pipe(case.pipe)
    assert other.transformer is case.model
    assert isinstance(pickle.loads(pickle.dumps(case.model)), LazyModule)


@pytest.mark.parametrize("seed", slow_but([5], [0, 5]))
def test_a_sample_inside_a_callback_leaves_the_outer_one_its_caches(seed: int) -> None:
    case, inner = flux(), []
    lazy_compile.transform(case.pipe)
    case.sample()
    reuse_every_second_step(case)
    alone = case.sample()

    def preview(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and not inner:
            inner.append(step)
            outer, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
            inner.append(case.sample(generator=torch.Generator().manual_seed(seed)))
            pipe.scheduler = outer
        return values

    assert torch.equal(case.sample(callback_on_step_end=preview), alone)
    assert torch.equal(inner[1], case.sample(generator=torch.Generator().manual_seed(seed)))
    assert case.model.cache_bytes == 0


def test_gates_are_saved_beside_the_model_and_read_again(tmp_path: Path) -> None:
    case = dit()
    lazy_compile.transform(case.pipe)
    case.sample()
    reuse_every_second_step(case)
    lazy = case.sample()
    case.pipe.save_pretrained(tmp_path)
    again = Case(diffusers.DiTPipeline.from_pretrained(tmp_path), case.arguments)
    assert not isinstance(again.model, LazyModule)
    lazy_compile.load(tmp_path, again.pipe)
    assert torch.equal(again.sample(), lazy)
    assert again.model.stats.lazy_ratio == 0.5


def test_a_saved_pipeline_without_gates_is_refused(tmp_path: Path) -> None:
    case = dit()
    case.pipe.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="holds no gates; expected a folder that save_pretrained"):
        lazy_compile.load(tmp_path, case.pipe)


def test_restore_puts_the_original_back() -> None:
    case = dit()
    original = case.model
    lazy_compile.transform(case.pipe)
    assert lazy_compile.restore(case.pipe) is case.pipe
    assert case.model is original
    with pytest.raises(ConfigError, match="no model of this DiTPipeline is lazy; there is nothing to restore"):
        lazy_compile.restore(case.pipe)


def test_only_the_named_models_become_lazy() -> None:
    case = dit()
    lazy_compile.transform(case.pipe, components=["transformer"], reuse="last")
    assert case.model.lazy_config.reuse == "last"
    assert not isinstance(case.pipe.vae, LazyModule)
    with pytest.raises(ConfigError, match="transformer of this DiTPipeline is lazy already"):
        lazy_compile.transform(case.pipe)


def test_what_cannot_be_is_refused() -> None:
    case = dit()
    with pytest.raises(ConfigError, match="has no model 'prior'; its models are "):
        lazy_compile.transform(case.pipe, components=["prior"])
    with pytest.raises(ConfigError, match="a pipeline takes no example_inputs"):
        lazy_compile.transform(case.pipe, {"hidden_states": torch.zeros(1)})
    with pytest.raises(ConfigError, match="components names models of a pipeline; seen DiTTransformer2DModel"):
        lazy_compile.transform(case.model, components=["transformer"])
