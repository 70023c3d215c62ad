"""The models that are measured: the shapes of known ones, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Shape = tuple[nn.Module, dict[str, Any]]


def dit(layers: int, heads: int, size: int, head_size: int = 72) -> Shape:
    """DiT with latents of ``size`` x ``size``, patches of 2 x 2, batch 2 (both rows of guidance)."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_size, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=size, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, size, size),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
        "return_dict": False,
    }
    return model, inputs


def flux(double: int, single: int, heads: int, tokens: int, text: int) -> Shape:
    """Flux with fewer blocks: joint attention, then parallel ones; batch 1."""
    from diffusers import FluxTransformer2DModel

    axes = (16, 56, 56) if heads > 4 else (4, 6, 6)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=sum(axes),
        num_attention_heads=heads, joint_attention_dim=32 * heads, pooled_projection_dim=64, axes_dims_rope=axes,
        guidance_embeds=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, text, 32 * heads),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5]),
        "return_dict": False,
    }
    return model, inputs


FULL: dict[str, Callable[[], Shape]] = {
    "DiT-XL/2-256": lambda: dit(28, 16, 32),
    "DiT-XL/2-512": lambda: dit(28, 16, 64),
    "Flux-like (4 + 8 of 19 + 38 blocks)": lambda: flux(4, 8, 24, 4096, 512),
}
SMALL: dict[str, Callable[[], Shape]] = {
    "DiT, 2 small blocks": lambda: dit(2, 2, 8, 16),
    "Flux-like, 1 + 1 small blocks": lambda: flux(1, 1, 2, 16, 4),
}


def make(build: Callable[[], Shape], dtype: torch.dtype, device: torch.device) -> Shape:
    """The model and the arguments of one call, floating tensors in ``dtype``."""
    torch.manual_seed(0)
    model, inputs = build()

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return model.eval().to(device, dtype), {name: place(value) for name, value in inputs.items()}
