"""Published models at their full size, on the meta device: configurations and the shapes of one call, no weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile.errors import import_optional

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class FullSize:
    """One model and its usual call.

    Attributes:
        setting: the resolution, and the number of frames of a video.
        model: a class of diffusers, or one of this module.
        config: as published.
        shapes: of the floating tensors of a call at batch 1.
        others: arguments that are not floating tensors: shapes of integer ones by ``(torch.long, *shape)``.
    """

    setting: str
    model: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    others: Mapping[str, Any]

    def build(self, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The model in evaluation mode and the arguments of a call, all on the meta device.

        Args:
            changes: to the configuration: fewer layers, say.
        """
        make: Callable[..., nn.Module] = globals().get(self.model) or getattr(
            import_optional("diffusers", "diffusers"), self.model
        )
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = nn.Module.to(make(**{**self.config, **changes}), "meta", DTYPE).eval()
            inputs: dict[str, Any] = {name: torch.empty(shape, dtype=DTYPE) for name, shape in self.shapes.items()}
            inputs |= {name: _other(value) for name, value in self.others.items()}
        return model, inputs


def _other(value: Any) -> Any:
    return torch.empty(value[1:], dtype=value[0]) if isinstance(value, tuple) else value


class LargeDiT(nn.Module):
    """The class-conditional Large-DiT of LLaMA2-Accessory at 7 billion parameters: a DiT with LLaMA blocks.

    Rotary embeddings, normalised queries and keys, SwiGLU, RMS norms, adaLN; learned tokens end each line of the image.
    """

    def __init__(self, dim: int = 4096, layers: int = 32, heads: int = 32, channels: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patch, self.out_channels, self.head_dim = patch, 2 * channels, dim // heads
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.line_end = nn.Parameter(torch.empty(dim))
        self.time = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, 1024))
        self.label = nn.Embedding(1001, 1024)
        self.blocks = nn.ModuleList(LargeDiTBlock(dim, heads) for _ in range(layers))
        self.final_modulation = nn.Linear(1024, 2 * dim)
        self.final = nn.Linear(dim, self.out_channels * patch * patch)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.embed(F.pixel_unshuffle(x, self.patch).permute(0, 2, 3, 1))
        tokens = torch.cat([tokens, self.line_end.expand(x.shape[0], height, 1, -1)], dim=2).flatten(1, 2)
        angles = t[:, None].float() * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)) + self.label(y)
        places = torch.arange(height * (width + 1), device=x.device, dtype=torch.float32)
        frequencies = 10000 ** (-torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)
        rotary = torch.outer(places, frequencies)
        for block in self.blocks:
            tokens = block(tokens, condition, rotary.cos().to(x.dtype), rotary.sin().to(x.dtype))
        shift, scale = self.final_modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift
        lines = self.final(tokens).unflatten(1, (height, width + 1))[:, :, :width]
        image: Tensor = F.pixel_shuffle(lines.permute(0, 3, 1, 2), self.patch)
        return image


class LargeDiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        hidden = 256 * math.ceil(8 * dim / 3 / 256)
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.modulation = nn.Linear(1024, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        h = self.attention_norm(x) * (1 + scale_a) + shift_a
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in (self.q_norm(self.q(h)), self.k_norm(self.k(h)), self.v(h))
        )
        q, k, v = (part.transpose(1, 2) for part in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        x = x + gate_a * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.mlp_norm(x) * (1 + scale_m) + shift_m
        result: Tensor = x + gate_m * self.down(F.silu(self.gate(h)) * self.up(h))
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2)


FULL_SIZE: dict[str, FullSize] = {
    "DiT-XL/2": FullSize(
        "256 px",
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
        },
        {"hidden_states": (1, 4, 32, 32)},
        {"timestep": (torch.long, 1), "class_labels": (torch.long, 1), "return_dict": False},
    ),
    "Large-DiT-7B": FullSize(
        "256 px", "LargeDiT", {}, {"x": (1, 4, 32, 32), "t": (1,)}, {"y": (torch.long, 1)}
    ),
    "PixArt-Sigma": FullSize(
        "1024 px",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "num_layers": 28, "cross_attention_dim": 1152, "sample_size": 128, "patch_size": 2,
            "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False,
        },
        {"hidden_states": (1, 4, 128, 128), "encoder_hidden_states": (1, 300, 4096)},
        {
            "timestep": (torch.long, 1),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        },
    ),
    "Sana-1.6B": FullSize(
        "1024 px",
        "SanaTransformer2DModel",
        {},  # its defaults are the published ones
        {"hidden_states": (1, 32, 32, 32), "encoder_hidden_states": (1, 300, 2304)},
        {"timestep": (torch.long, 1), "return_dict": False},
    ),
    "SD3.5-Large": FullSize(
        "1024 px",
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 38, "attention_head_dim": 64,
            "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
        {"hidden_states": (1, 16, 128, 128), "encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)},
        {"timestep": (torch.long, 1), "return_dict": False},
    ),
    "FLUX.1-dev": FullSize(
        "1024 px",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},  # otherwise its defaults are the published ones
        {
            "hidden_states": (1, 4096, 64), "encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768),
            "timestep": (1,), "img_ids": (4096, 3), "txt_ids": (512, 3), "guidance": (1,),
        },
        {"return_dict": False},
    ),
    "Wan2.1-T2V-14B": FullSize(
        "480p, 81 frames",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
            "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        },
        {"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096)},
        {"timestep": (torch.long, 1), "return_dict": False},
    ),
    "HunyuanVideo": FullSize(
        "544 x 960, 129 frames",
        "HunyuanVideoTransformer3DModel",
        {},  # its defaults are the published ones
        {
            "hidden_states": (1, 16, 33, 68, 120), "encoder_hidden_states": (1, 256, 4096),
            "pooled_projections": (1, 768), "guidance": (1,),
        },
        {"timestep": (torch.long, 1), "encoder_attention_mask": (torch.bool, 1, 256), "return_dict": False},
    ),
}  # fmt: skip
