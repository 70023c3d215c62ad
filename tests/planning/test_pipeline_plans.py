"""Plans from a pipeline's own call: its scheduler, its guidance, its latents; and what they take."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import Budget, CacheSchedule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.pipeline_sampling import PipelineSampler, pipeline_samplers
from lazy_compile.planning.sample_response import measure_response
from lazy_compile.planning.search import SearchOptions
from lazy_compile.planning.trace import MAX_AGE
from lazy_compile.progress import no_progress
from support.diffusers_pipelines import (
    STEPS,
    WORDS,
    Case,
    dit,
    flux,
    normal,
    pixart,
    random_weights,
    sd3,
    stable_diffusion,
    wan,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HALF = Budget(lazy_ratio=0.5)


def planned(case: Case, **options: Any) -> dict[str, CacheSchedule]:
    arguments = {key: value for key, value in case.arguments.items() if key != "output_type"}
    given = {"calls": 50, "num_inference_steps": STEPS, "on_progress": no_progress, **arguments, **options}
    return lazy_compile.plan(case.pipe, HALF, **given)


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        pytest.param(flux, 50, id="flux"),
        pytest.param(wan, 80, id="wan", marks=pytest.mark.slow),  # calls its model twice at a step
        pytest.param(stable_diffusion, 50, id="stable_diffusion", marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_is_planned_by_its_own_call_and_follows_the_plan(make: Any, calls: int) -> None:
    case = make()
    before = dict(getattr(case.pipe, "_progress_bar_config", {}))
    schedules = planned(case, calls=calls)
    assert list(schedules) == [case.denoiser]
    assert case.model.policy == Scheduled(schedules[case.denoiser])
    assert schedules[case.denoiser].steps == STEPS
    assert case.pipe.__dict__.get("_progress_bar_config", {}) == before
    assert torch.isfinite(case.sample()).all()
    assert case.model.stats.lazy_ratio >= 0.5


def test_a_pipeline_that_always_decodes_is_planned_by_what_its_scheduler_returned(tmp_path: Path) -> None:
    case = dit()
    (schedule,) = planned(case, checkpoint=tmp_path).values()
    assert schedule.lazy_ratio >= 0.5
    assert list(tmp_path.glob("transformer/*.safetensors")), "each model has a checkpoint of its own"


class Prompted(diffusers.StableDiffusion3Pipeline):
    """Takes texts, and makes embeddings of their lengths."""

    def encode_prompt(self, prompt: Any, **options: Any) -> tuple[Tensor, ...]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        seeds = [len(text) for text in texts]
        words, pooled = (torch.cat([normal(1, *size, seed=each) for each in seeds]) for size in ((WORDS, 12), (10,)))
        return words, torch.zeros_like(words), pooled, torch.zeros_like(pooled)


@cache
def prompted() -> Case:
    """Its transformer is lazy, and captured at its first call."""
    case = sd3()
    case.pipe.vae.register_to_config(shift_factor=0.0)
    pipe = Prompted(case.pipe.transformer, diffusers.FlowMatchEulerDiscreteScheduler(), case.pipe.vae, *[None] * 6)
    lazy_compile.transform(pipe)
    return Case(pipe, {"height": 8, "width": 8})


def test_prompts_are_drawn_each_with_noise_of_its_own_whatever_the_batch() -> None:
    case = prompted()
    texts = ["a", "bbb", "cc"]
    call = {"num_inference_steps": 2, **case.arguments}
    whole, *none = pipeline_samplers(case.pipe, call, texts, "latent", None, 1)
    assert not none
    expected = whole(case.model, 3)
    assert expected.shape[0] == 3
    parts = pipeline_samplers(case.pipe, call, texts, "latent", 2, 1)
    assert [len(part.prompts) for part in parts] == [2, 1]
    torch.testing.assert_close(torch.cat([part(case.model, 3) for part in parts]), expected, atol=1e-5, rtol=1e-5)
    again = pipeline_samplers(case.pipe, call, texts, "latent", None, 2)[1]
    assert not torch.allclose(again(case.model, 3), expected, atol=0.1)


def test_gradients_reach_the_denoiser_and_small_batches_measure_what_one_does() -> None:
    case, texts = prompted(), ["a", "bbb"]
    call = {"num_inference_steps": 4, **case.arguments}
    pipeline_samplers(case.pipe, call, texts, "latent", None, 1)[0](case.model, 0)
    branches = len(case.model.branches)
    schedule = CacheSchedule.every(2, 4, branches)
    whole, small = (
        measure_response(
            case.model, pipeline_samplers(case.pipe, call, texts, "latent", size, 1), schedule, seed=0, directions=2
        )
        for size in (None, 1)
    )
    assert whole.directional_derivatives.shape == (4, 4, branches, MAX_AGE + 1)
    assert np.abs(whole.directional_derivatives).max() > 0
    assert whole.size == small.size
    for name in ("directional_derivatives", "error", "weights", "sensitivity"):
        np.testing.assert_allclose(getattr(small, name), getattr(whole, name), rtol=1e-3, atol=1e-5)


def test_decoded_samples_and_functions_of_them_can_be_compared() -> None:
    case = prompted()
    call = {"num_inference_steps": 2, **case.arguments}
    decoded = PipelineSampler(case.pipe, call, ("a",), "decoded")(case.model, 0)
    assert decoded.shape[1] == 3
    mean = PipelineSampler(case.pipe, call, ("a",), lambda images: images.mean((2, 3), keepdim=True))(case.model, 0)
    torch.testing.assert_close(mean, decoded.mean((2, 3), keepdim=True))
    schedule = CacheSchedule.every(2, 2, len(case.model.branches))
    sampler = PipelineSampler(case.pipe, call, ("a",), "decoded")
    assert measure_response(case.model, sampler, schedule, seed=0).error.any()


def two_transformers() -> Case:
    case = wan()
    second = random_weights(diffusers.WanTransformer3DModel.from_config(case.pipe.transformer.config))
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=case.pipe.vae, scheduler=case.pipe.scheduler,
        transformer=case.pipe.transformer, transformer_2=second, boundary_ratio=0.8,
    )  # fmt: skip
    return Case(pipe, case.arguments)


def test_two_transformers_have_a_schedule_each() -> None:
    case = two_transformers()
    schedules = planned(case, num_inference_steps=8, calls=80)
    assert set(schedules) == {"transformer", "transformer_2"}
    assert sum(schedule.steps for schedule in schedules.values()) == 8
    case.sample(num_inference_steps=8)
    assert all(getattr(case.pipe, name).stats.lazy_ratio >= 0.4 for name in schedules)


def test_an_estimate_is_made_before_anything_starts() -> None:
    case = pixart()
    estimate = lazy_compile.estimate_plan(case.pipe, num_inference_steps=STEPS, **case.arguments)["transformer"]
    assert estimate.steps == STEPS
    assert estimate.model_calls == SearchOptions().trajectories * STEPS
    assert 0 < estimate.device_bytes < 1e8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "a lighthouse"}, "expected a list of texts"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompt": "a"}, "give prompts="),
        ({"num_inference_steps": 1}, "at two steps or more"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(pixart(), **options)
