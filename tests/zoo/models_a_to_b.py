"""diffusers' transformers from AceStep to Bria."""

from __future__ import annotations

import diffusers
import torch

from zoo.inputs import WORDS, flux_inputs, latents, text, timestep
from zoo.registry import Family, zoo_model


@zoo_model("AceStepTransformer1DModel")
def ace_step() -> Family:
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, rope_theta=10000.0, sliding_window=3,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(16, 8),
        "timestep": timestep(0.5),
        "timestep_r": timestep(0.4),
        "encoder_hidden_states": text(48),
        "context_latents": latents(16, 16),
    }


@zoo_model("AllegroTransformer3DModel")
def allegro() -> Family:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, sample_width=8, sample_height=8, sample_frames=3, caption_channels=12,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "encoder_hidden_states": text(12).unsqueeze(1),
        "timestep": timestep().long(),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "image_rotary_emb": _allegro_rope(),
    }


def _allegro_rope() -> tuple[tuple[object, ...], tuple[torch.Tensor, ...]]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, _, _, _ = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=3
    )
    positions = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4))
    return tuple(tables), tuple(positions.T.unsqueeze(1))


@zoo_model("AnyFlowTransformer3DModel")
def any_flow() -> Family:
    model = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(3, 4, 8, 8),
        "timestep": torch.full((2, 3), 500.0),
        "r_timestep": torch.full((2, 3), 250.0),
        "encoder_hidden_states": text(12),
    }


@zoo_model("AnyFlowFARTransformer3DModel")
def any_flow_far() -> Family:
    model = diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=96, num_layers=2, rope_max_seq_len=32, chunk_partition=(1, 2, 1),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 4, 8, 8),
        "timestep": torch.full((2, 4), 500.0),
        "r_timestep": torch.full((2, 4), 250.0),
        "encoder_hidden_states": text(12),
        "chunk_partition": [1, 2, 1],
    }


@zoo_model("AuraFlowTransformer2DModel")
def aura_flow() -> Family:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=12, caption_projection_dim=32, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": timestep(0.5),
    }


@zoo_model("BriaTransformer2DModel")
def bria() -> Family:
    model = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    return model, flux_inputs()


@zoo_model("BriaFiboTransformer2DModel")
def bria_fibo() -> Family:
    model = diffusers.BriaFiboTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, axes_dims_rope=[2, 2, 4], text_encoder_dim=6,
    )  # fmt: skip
    return model, {**flux_inputs(), "text_encoder_layers": [text(6), text(6), text(6)]}


@zoo_model("BriaFibo2Transformer2DModel")
def bria_fibo2() -> Family:
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
        injection_layer_ids=(1, 2), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
        gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(16, 16, 16),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep(0.5),
        "encoder_hidden_states": latents(3, 6, 12),
    }
