"""What the pages' blocks stand on: small random models in the place of published weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.comfy_stand_in import BaseModel, ModelPatcher, Sampler, diffusion_model
from support.diffusers_pipelines import dit, flux, sd3
from support.layers import TOKENS, WIDTH
from support.small_model import Small
from support.toy_server import Request

Setup = Callable[[], dict[str, Any]]


def doc_setups(patch: pytest.MonkeyPatch) -> dict[str, Setup]:
    """Set-ups by the name that a page gives them; what they change lasts as long as ``patch``."""

    def stable_diffusion_3() -> dict[str, Any]:
        """``StableDiffusion3Pipeline.from_pretrained`` returns a tiny pipeline that takes any prompt."""
        import diffusers

        case = sd3(layers=1)
        case.pipe.vae.register_to_config(shift_factor=0.0)
        case.pipe.set_progress_bar_config(disable=True)
        embeds = [
            case.arguments[name]
            for name in (
                "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
            )
        ]  # fmt: skip
        patch.setattr(case.pipe, "encode_prompt", lambda *_, **__: embeds)
        patch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: case.pipe)
        return {"pipe": case.pipe}

    def small_model() -> dict[str, Any]:
        """A model of one attention and one MLP, and a sampling loop of four steps around it."""
        model = Small().eval()

        def sample(denoiser: Any, seed: int) -> torch.Tensor:
            x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
            for t in (900.0, 700.0, 500.0, 300.0):
                x = x - 0.1 * denoiser(x, torch.full((2,), t))
            return x

        return {
            "model": model,
            "inputs": (torch.zeros(2, TOKENS, WIDTH), torch.full((2,), 500.0)),
            "my_sampler": sample,
        }

    def compiled_model() -> dict[str, Any]:
        """The same, and a compiler that has not seen it."""
        torch.compiler.reset()
        return small_model()

    def dit_pipeline() -> dict[str, Any]:
        """A tiny pipeline of DiT, as ``pipe``, and a copy of its transformer as ``model``."""
        case = dit()
        case.pipe.set_progress_bar_config(disable=True)
        return {"pipe": case.pipe, "model": copy.deepcopy(case.model)}

    def flux_pipeline() -> dict[str, Any]:
        """A tiny pipeline of Flux, as ``pipe``, and ``draw``, a call of it."""
        case = flux()
        return {"pipe": case.pipe, "draw": lambda pipe: case.sample()}

    def dit_inputs() -> dict[str, Any]:
        """Arguments of one call of its transformer."""
        torch.compiler.reset()
        return {
            "inputs": {
                "hidden_states": torch.zeros(2, 4, 8, 8),
                "timestep": torch.tensor([500, 500]),
                "class_labels": torch.tensor([207, 360]),
            }
        }

    def server() -> dict[str, Any]:
        """The small model, also as ``pipeline.transformer``, and a class ``Request`` of noise and steps."""
        model = Small().eval()
        return {"model": model, "pipeline": SimpleNamespace(transformer=model), "Request": Request}

    def comfy_model() -> dict[str, Any]:
        """A MODEL of the stand-in of ComfyUI, and a sampler of seven steps."""
        sampler = Sampler()
        return {"model": ModelPatcher(BaseModel(diffusion_model())), "sample": sampler.sample}

    setups = (
        stable_diffusion_3,
        small_model,
        dit_pipeline,
        flux_pipeline,
        dit_inputs,
        server,
        comfy_model,
        compiled_model,
    )
    return {setup.__name__: setup for setup in setups}
