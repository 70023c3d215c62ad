"""Sampling of models that predict a velocity ``noise - image``, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lazy_compile.errors import import_optional

FlowSolver = Literal["euler", "dpm++2m"]


def flow_schedule(solver: FlowSolver, steps: int, shift: float = 1.0) -> Any:
    """A scheduler of diffusers with its timesteps set; a larger `shift` spends more of them on noise."""
    diffusers = import_optional("diffusers", "demo")
    schedule = (
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
        if solver == "dpm++2m"
        else diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    )
    schedule.set_timesteps(steps)
    return schedule


def sample_flow(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, schedule: Any, guidance_scale: float
) -> Tensor:
    """From ``noise`` to images of the same shape ``float[B, ...]``.

    Args:
        velocity: ``(images, timesteps) -> velocities``, once a step on 2B rows: B with their prompt, then the same B
            with an empty one.
        noise: where the flow starts.
        schedule: from `flow_schedule`.
        guidance_scale: 1 follows the prompt alone, more goes further away from the empty one.
    """
    images = noise
    for t in schedule.timesteps:
        guided, unguided = velocity(torch.cat([images, images]), t.repeat(2 * len(images))).chunk(2)
        guided = unguided + guidance_scale * (guided - unguided)
        images = schedule.step(guided, t, images, return_dict=False)[0]
    return images
