"""Small configurations of diffusers' U-Nets that hold transformers, and of transformers that steer others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models import unets
from torch import nn

from zoo.inputs import BATCH, latents, text, timestep
from zoo.registry import Family, zoo_model

TEXT = 12
LEVELS: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 4}
"""Two levels, the first with transformers."""


def _call(channels: int = 4) -> dict[str, Any]:
    return {"sample": latents(channels, 8, 8), "timestep": timestep(), "encoder_hidden_states": text(TEXT)}


@zoo_model("UNet2DConditionModel-sdxl")
def unet_of_sdxl() -> Family:
    """Two blocks to a transformer, linear projections around it, sizes and a pooled text beside the timestep."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=TEXT, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + TEXT, **LEVELS,
    )  # fmt: skip
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * BATCH)
    return model, {**_call(), "added_cond_kwargs": {"text_embeds": torch.randn(BATCH, TEXT), "time_ids": sizes}}


@zoo_model("UNet3DConditionModel")
def unet3d() -> Family:
    model = diffusers.UNet3DConditionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=TEXT, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **LEVELS,
    )  # fmt: skip
    return model, {**_call(), "sample": latents(4, 3, 8, 8)}


@zoo_model("UNetMotionModel")
def unet_motion() -> Family:
    """AnimateDiff: transformers over the frames of each place between those over the places of each frame."""
    model = diffusers.UNetMotionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=TEXT, num_attention_heads=2,
        motion_num_attention_heads=2, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), **LEVELS,
    )  # fmt: skip
    frames = 3
    text_of_frames = text(TEXT).repeat_interleave(frames, dim=0)
    return model, {**_call(), "sample": latents(4, frames, 8, 8), "encoder_hidden_states": text_of_frames}


@zoo_model("UNetSpatioTemporalConditionModel")
def unet_spatio_temporal() -> Family:
    """Stable Video Diffusion; its group norms are fixed to 32 groups."""
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=TEXT, num_attention_heads=(2, 4), num_frames=3, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    return model, {
        "sample": latents(3, 8, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(TEXT, words=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * BATCH),
    }


@zoo_model("AudioLDM2UNet2DConditionModel")
def unet_of_audioldm2() -> Family:
    """Two texts, read by transformers of their own at every level."""
    model = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=((None, TEXT, 16),) * 2, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **LEVELS,
    )  # fmt: skip
    return model, {**_call(), "encoder_hidden_states_1": text(16, words=4)}


@zoo_model("DreamLiteUNetModel")
def unet_dreamlite() -> Family:
    """Separable convolutions, one key and value head for all queries, cross-attention alone at the outer levels."""
    model = diffusers.DreamLiteUNetModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=TEXT, attention_head_dim=2, ff_mult=2,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"), **LEVELS,
    )  # fmt: skip
    return model, _call()


@zoo_model("UNetControlNetXSModel")
def unet_controlnet_xs() -> Family:
    model = diffusers.UNetControlNetXSModel(
        sample_size=8, cross_attention_dim=TEXT, num_attention_heads=2, ctrl_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ctrl_block_out_channels=(4, 8), ctrl_max_norm_num_groups=2, ctrl_conditioning_embedding_out_channels=(4, 4),
        **LEVELS,
    )  # fmt: skip
    return model, {**_call(), "controlnet_cond": latents(3, 16, 16)}


@zoo_model("StableCascadeUNet")
def unet_stable_cascade() -> Family:
    model = unets.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16, block_out_channels=(16, 16),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        clip_text_in_channels=TEXT, clip_text_pooled_in_channels=TEXT, clip_image_in_channels=TEXT, clip_seq=2,
        dropout=(0.0, 0.0), switch_level=(False,),
    )  # fmt: skip
    return model, {
        "sample": latents(4, 8, 8),
        "timestep_ratio": timestep(0.5),
        "clip_text_pooled": torch.randn(BATCH, 1, TEXT),
        "clip_text": text(TEXT),
        "clip_img": torch.randn(BATCH, 1, TEXT),
    }


def _sd3_like() -> dict[str, Any]:
    return {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": TEXT, "caption_projection_dim": 32,
        "pooled_projection_dim": 10, "out_channels": 4, "pos_embed_max_size": 8,
    }  # fmt: skip


@zoo_model("SD3Transformer2DModel-controlled")
def sd3_with_residuals() -> Family:
    """What a ControlNet returns is added between the blocks, which have a second attention of the image alone."""
    model: nn.Module = diffusers.SD3Transformer2DModel(**_sd3_like(), dual_attention_layers=(0,), qk_norm="rms_norm")
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(TEXT),
        "pooled_projections": torch.randn(BATCH, 10),
        "timestep": timestep(),
        "block_controlnet_hidden_states": [latents(16, 32)],
    }


@zoo_model("SD3ControlNetModel")
def sd3_controlnet() -> Family:
    model = diffusers.SD3ControlNetModel(**_sd3_like())
    return model, {
        "hidden_states": latents(4, 8, 8),
        "controlnet_cond": latents(4, 8, 8),
        "encoder_hidden_states": text(TEXT),
        "pooled_projections": torch.randn(BATCH, 10),
        "timestep": timestep(),
    }
