"""Models of about 100 million parameters in the shapes of published ones, with random weights and one call's inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lazy_compile.errors import import_optional

Built = tuple[nn.Module, dict[str, Any]]


def dit(layers: int = 12, heads: int = 12) -> Built:
    """The shape of DiT-B/2 at 256 tokens and batch 2."""
    model = _diffusers().DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
        "return_dict": False,
    }


def sd3(layers: int = 8, heads: int = 10) -> Built:
    """Stable Diffusion 3.5: image and text streams that attend together, normalised queries and keys."""
    model = _diffusers().SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, num_attention_heads=heads,
        attention_head_dim=64, joint_attention_dim=512, caption_projection_dim=64 * heads, pooled_projection_dim=256,
        pos_embed_max_size=64, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 32, 32),
        "encoder_hidden_states": torch.randn(1, 77, 512),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


def flux(layers: int = 4, heads: int = 9) -> Built:
    """FLUX.1: blocks of two streams, then twice as many parallel ones, rotary embeddings."""
    model = _diffusers().FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=layers, num_single_layers=2 * layers, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=512, pooled_projection_dim=256, guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    places = torch.stack([torch.zeros(256), torch.arange(256) // 16, torch.arange(256) % 16], dim=-1)
    return model, {
        "hidden_states": torch.randn(1, 256, 64),
        "encoder_hidden_states": torch.randn(1, 128, 512),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(128, 3),
        "guidance": torch.tensor([3.5]),
        "return_dict": False,
    }


def wan(layers: int = 10, heads: int = 6) -> Built:
    """Wan 2.1: video tokens, rotary embeddings that are written slice by slice, attention to a text."""
    model = _diffusers().WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=512, freq_dim=256, ffn_dim=512 * heads, num_layers=layers, cross_attn_norm=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 4, 20, 20),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 512),
        "return_dict": False,
    }


def cogview4(layers: int = 8, heads: int = 12) -> Built:
    """CogView4: text and image in one stream, rotary embeddings on the image part only."""
    model = _diffusers().CogView4Transformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=heads, text_embed_dim=512, time_embed_dim=256, condition_dim=128, pos_embed_max_size=64,
        sample_size=64, rope_axes_dim=(256, 256),
    )  # fmt: skip
    size = torch.tensor([[320.0, 320.0]])
    return model, {
        "hidden_states": torch.randn(1, 16, 40, 40),
        "encoder_hidden_states": torch.randn(1, 64, 512),
        "timestep": torch.tensor([500]),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(1, 2),
        "return_dict": False,
    }


class _Block(nn.Module):
    """Attention and MLP of a small width, modulated as in DiT."""

    def __init__(self, width: int, attends: bool) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.attention = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)] if attends else [])
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, gate, mlp_scale, mlp_gate = self.modulation(condition)[:, None].chunk(4, -1)
        if len(self.attention):
            inwards, outwards = self.attention
            parts = inwards(self.norm(x) * (1 + scale)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
            x = x + gate * outwards(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale))
        return result


class _Tiny(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(_Block(width, attends=index > 0) for index in range(layers))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        condition = nn.functional.silu(self.time(timestep[:, None] / 1000))
        for block in self.blocks:
            hidden_states = block(hidden_states, condition)
        return (hidden_states,)


def tiny(layers: int = 48, heads: int = 2) -> Built:
    """95 branches that take next to no time, so that what is left is the cost of deciding; not among MIDSIZE."""
    return _Tiny(layers, 16 * heads), {
        "hidden_states": torch.randn(1, 16, 16 * heads),
        "timestep": torch.tensor([500.0]),
    }


MIDSIZE: dict[str, Callable[..., Built]] = {"DiT": dit, "SD3": sd3, "FLUX": flux, "Wan": wan, "CogView4": cogview4}


def build(name: str, **sizes: int) -> Built:
    """One of :data:`MIDSIZE`, or ``"tiny"``, in evaluation mode; the same weights and inputs every time."""
    torch.manual_seed(0)
    makers = {**MIDSIZE, "tiny": tiny}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = makers[name](**sizes)
    return model.eval(), inputs


def later(inputs: dict[str, Any], step: int) -> dict[str, Any]:
    """The same call some steps later: the time has fallen."""
    timestep: Tensor = inputs["timestep"]
    return {**inputs, "timestep": timestep - (step if timestep.max() > 1 else step * 1e-3)}


def _diffusers() -> Any:
    return import_optional("diffusers", "diffusers")
