"""The diffusers models that most people run."""

from __future__ import annotations

import diffusers
import torch

from zoo.inputs import WORDS, flux_inputs, latents, text, timestep
from zoo.registry import Family, zoo_model


@zoo_model("DiTTransformer2DModel")
def dit() -> Family:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep().long(),
        "class_labels": torch.tensor([1, 2]),
    }


@zoo_model("PixArtTransformer2DModel")
def pixart() -> Family:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": torch.tensor([[1.0] * WORDS, [1.0] * 3 + [0.0] * (WORDS - 3)]),
        "timestep": timestep().long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@zoo_model("SD3Transformer2DModel")
def sd3() -> Family:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": timestep(),
    }


@zoo_model("FluxTransformer2DModel")
def flux() -> Family:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return model, {
        **flux_inputs(),
        "pooled_projections": torch.randn(2, 10),
        "guidance": torch.full((2,), 3.5),
    }


@zoo_model("WanTransformer3DModel")
def wan() -> Family:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=96, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
    }


@zoo_model("SanaTransformer2DModel")
def sana() -> Family:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=12,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": timestep(),
    }


@zoo_model("UNet2DConditionModel")
def unet() -> Family:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    return model, {
        "sample": latents(4, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
    }
