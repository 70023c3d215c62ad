"""Real model classes of diffusers with small configurations and random weights, for checks of whole engines."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from support.toy_models import randomize

Family = tuple[nn.Module, dict[str, Any]]

HEADS, TEXT = 4, 12


def dit() -> Family:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }


def pixart() -> Family:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=128, sample_size=16, patch_size=2, caption_channels=64, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 64),
        "timestep": torch.tensor([5, 5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> Family:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=2,
        caption_projection_dim=128, joint_attention_dim=64, pooled_projection_dim=64, sample_size=16, patch_size=2,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([5, 5]),
    }


def flux() -> Family:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=HEADS, joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 64, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 64),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def wan() -> Family:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=32, in_channels=4, out_channels=4,
        text_dim=64, freq_dim=64, ffn_dim=256, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 16, 16),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, TEXT, 64),
    }


def digits() -> Family:
    """The trained model of ``examples/digits``."""
    from lazy_compile.bench.tasks.digits import example_inputs, load_or_train_digits_dit
    from lazy_compile.bench.tasks.training import default_checkpoints

    return load_or_train_digits_dit(default_checkpoints("digits") / "digits_dit.safetensors"), example_inputs(4)


FAMILIES: dict[str, Callable[[], Family]] = {
    "digits": digits,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
}


def family(name: str, dtype: torch.dtype = torch.float32) -> Family:
    """A model in evaluation mode and the arguments of one call, their floating tensors in ``dtype``."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = FAMILIES[name]()
        model = (model if name == "digits" else randomize(model)).eval().to(dtype)
    return model, pytree.tree_map(lambda leaf: _cast(leaf, dtype), inputs)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
