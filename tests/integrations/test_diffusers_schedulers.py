"""Pipelines of diffusers with schedulers that add noise, call twice a step, or repeat times: calls are counted."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from support.diffusers_pipelines import STEPS, Case, flux, stable_diffusion
from support.slow import slow_but

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of schedulers

CALLS = {
    "CMStochasticIterativeScheduler": STEPS, "DDIMInverseScheduler": STEPS, "DDPMParallelScheduler": STEPS,
    "DDPMScheduler": STEPS, "EulerAncestralDiscreteScheduler": STEPS, "HeunDiscreteScheduler": 2 * STEPS - 1,
    "KDPM2AncestralDiscreteScheduler": 2 * STEPS - 1, "KDPM2DiscreteScheduler": 2 * STEPS - 1, "LCMScheduler": STEPS,
    "PNDMScheduler": 15, "SASolverScheduler": STEPS, "TCDScheduler": STEPS,
}  # fmt: skip
"""Calls of the model in six steps; DDIMInverseScheduler makes the first noisier."""

FEW = ("DDPMScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler")


@cache
def shared() -> Case:
    case = stable_diffusion()
    lazy_compile.transform(case.pipe)
    case.sample()
    case.model.policy = Scheduled(CacheSchedule.every(2, 64, len(case.model.branches)))
    return case


def with_scheduler(name: str) -> Case:
    """Its cache is empty, and its statistics too; a scheduler may be exchanged after the pipeline was transformed."""
    case = shared()
    case.pipe.scheduler = getattr(diffusers, name)()
    case.model.reset()
    case.model.reset_stats()
    return case


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["alone", "guided"])
@pytest.mark.parametrize("scheduler", slow_but(FEW, CALLS))
def test_a_schedule_over_calls_is_followed_to_the_last(scheduler: str, guidance: float) -> None:
    case = with_scheduler(scheduler)
    sample = case.sample(guidance_scale=guidance)
    table = case.model.stats.reuse_table
    assert table[:, 0].tolist() == [step % 2 for step in range(CALLS[scheduler])]
    case.model.reset()
    with case.model.trajectory("one"):  # as a host would say that knows
        assert torch.equal(case.sample(guidance_scale=guidance), sample)


def sample_of(case: Case, seed: int, **options: Any) -> Tensor:
    return case.sample(generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("scheduler", slow_but(["DDPMScheduler"], FEW))
def test_cancelled_and_nested_samples_leave_others_alone(scheduler: str) -> None:
    case = with_scheduler(scheduler)
    alone = sample_of(case, 1)
    inner: list[Tensor] = []

    def cancel(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return values

    def preview(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and not inner:
            outer, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
            inner.append(values["latents"])
            inner.append(sample_of(case, 2))
            pipe.scheduler = outer
        return values

    for seed in (1, 3):  # of the same noise, and of another
        sample_of(case, seed, callback_on_step_end=cancel)
        assert torch.equal(sample_of(case, 1), alone)
    assert torch.equal(sample_of(case, 1, callback_on_step_end=preview), alone)
    case.model.reset()
    assert torch.equal(sample_of(case, 2), inner[1])


def test_another_image_from_the_same_latents_starts_afresh() -> None:
    """Image to image with two strengths, by a pipeline that shares the lazy model and the scheduler."""
    case = with_scheduler("DDPMScheduler")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(case.pipe)
    other.set_progress_bar_config(disable=True)
    assert other.unet is case.model

    def image(strength: float) -> Tensor:
        prompts = {name: case.arguments[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
        result = other(
            image=torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8), strength=strength, num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False, **prompts,
        )  # fmt: skip
        return torch.as_tensor(result[0])

    alone = []
    for strength in (0.9, 0.5):
        case.model.reset()
        alone.append(image(strength))
    case.model.reset()
    case.model.reset_stats()
    assert all(map(torch.equal, (image(0.9), image(0.5)), alone))
    assert case.model.stats.reuse_table[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_a_scheduler_stays_what_it_was(tmp_path: Path) -> None:
    case = flux()
    scheduler = case.pipe.scheduler
    kind = type(scheduler)
    lazy_compile.transform(case.pipe)
    case.sample()
    assert case.pipe.scheduler is scheduler
    assert isinstance(scheduler, kind)
    assert type(scheduler) is not kind
    for copied in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(copied) is kind
        assert copied.config == scheduler.config
        assert torch.equal(copied.timesteps, scheduler.timesteps)
    case.pipe.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path / "scheduler")) is kind
    assert f'"_class_name": "{kind.__name__}"' in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    lazy_compile.restore(case.pipe)
    assert type(scheduler) is kind
