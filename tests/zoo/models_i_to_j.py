"""diffusers' transformers Ideogram4 and JoyImage."""

from __future__ import annotations

import diffusers
import torch

from zoo.inputs import WORDS, latents, text, timestep
from zoo.registry import Family, zoo_model


@zoo_model("Ideogram4Transformer2DModel")
def ideogram4() -> Family:
    """Words and patches stand in one sequence; an indicator tells them apart."""
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4, intermediate_size=64, adaln_dim=16,
        llm_features_dim=12, rope_theta=10_000, mrope_section=(2, 1, 1),
    )  # fmt: skip
    is_word = torch.arange(WORDS + 16) < WORDS
    patches = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(4), torch.arange(4)) + IMAGE_POSITION_OFFSET
    positions = torch.cat([torch.arange(WORDS)[:, None].expand(-1, 3), patches])
    return model, {
        "hidden_states": latents(WORDS + 16, 8).masked_fill(is_word[:, None], 0.0),
        "timestep": timestep(0.5),
        "encoder_hidden_states": text(12, WORDS + 16).masked_fill(~is_word[:, None], 0.0),
        "position_ids": positions.expand(2, -1, -1),
        "segment_ids": torch.ones(2, WORDS + 16, dtype=torch.long),
        "indicator": torch.where(is_word, LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR).expand(2, -1),
    }


@zoo_model("JoyImageEditTransformer3DModel")
def joy_image_edit() -> Family:
    model = diffusers.JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return model, {
        "hidden_states": latents(3, 4, 1, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
    }


@zoo_model("JoyImageEditPlusTransformer3DModel")
def joy_image_edit_plus() -> Family:
    """Patches of several images in one padded sequence for each sample; their grids are Python numbers."""
    model = diffusers.JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return model, {
        "hidden_states": latents(20, 4, 1, 2, 2),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "shape_list": [[(1, 4, 4), (1, 2, 2)], [(1, 4, 4), (1, 2, 2)]],
    }
