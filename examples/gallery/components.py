"""Real components, small and random: what the examples of this folder run on instead of published weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

STEPS = 8


def random_weights(model: nn.Module) -> Any:
    """Everywhere, since adaLN starts at zero: a branch would contribute nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def denoiser() -> Any:
    return random_weights(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1000,
        )
    )  # fmt: skip


def pipeline() -> Any:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(denoiser(), random_weights(vae), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> Tensor:
    """Two images, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    images = pipe([1, 2], num_inference_steps=STEPS, generator=generator, output_type="np").images
    return torch.as_tensor(images)


def inputs(step: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser at one step."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.full((2,), 900 - 100 * step)
    return {"hidden_states": noise, "timestep": time, "class_labels": torch.tensor([1, 2])}


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """What a denoiser answers along a trajectory: ``float[STEPS, ...]``."""
    return torch.stack([model(**inputs(step), return_dict=False)[0] for step in range(STEPS)])


def show(dense: Tensor, computed: Tensor, lazy: Any) -> None:
    """The two things that every example ends with; ``lazy`` has ``stats``."""
    print("equal while nothing is reused:", torch.equal(dense, computed))
    print(f"lazy ratio {lazy.stats.lazy_ratio:.2f}, compute ratio {lazy.stats.compute_ratio:.2f}")
