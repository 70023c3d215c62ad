"""diffusers' transformers from Chroma to Dual."""

from __future__ import annotations

import diffusers
import torch

from zoo.inputs import WORDS, flux_inputs, latents, text, timestep
from zoo.registry import Family, zoo_model


@zoo_model("ChromaTransformer2DModel")
def chroma() -> Family:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return model, flux_inputs()


@zoo_model("ChronoEditTransformer3DModel")
def chrono_edit() -> Family:
    model = diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=96, num_layers=2, image_dim=10, added_kv_proj_dim=48, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12, 512),
        "encoder_hidden_states_image": latents(6, 10),
    }


@zoo_model("CogVideoXTransformer3DModel")
def cog_video() -> Family:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=WORDS,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(3, 4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": timestep().long(),
        "image_rotary_emb": (torch.rand(48, 8), torch.rand(48, 8)),
    }


@zoo_model("CogView3PlusTransformer2DModel")
def cog_view3() -> Family:
    model = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
        text_embed_dim=12, time_embed_dim=16, condition_dim=4, pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": timestep().long(),
        "original_size": torch.full((2, 2), 64.0),
        "target_size": torch.full((2, 2), 64.0),
        "crop_coords": torch.zeros(2, 2),
    }


@zoo_model("CogView4Transformer2DModel")
def cog_view4() -> Family:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
        text_embed_dim=12, time_embed_dim=16, condition_dim=4, rope_axes_dim=(16, 16),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": timestep().long(),
        "original_size": torch.full((2, 2), 64.0),
        "target_size": torch.full((2, 2), 64.0),
        "crop_coords": torch.zeros(2, 2),
    }


@zoo_model("ConsisIDTransformer3DModel")
def consis_id() -> Family:
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=WORDS, is_train_face=True,
        cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=6, LFE_vit_dim=6, LFE_depth=5,
        LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=3, LFE_num_querie=4, LFE_output_dim=21, LFE_ff_mult=1,
        LFE_num_scale=1,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(3, 4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": timestep().long(),
        "id_vit_hidden": [latents(7, 6)],
        "id_cond": torch.randn(2, 6),
    }


@zoo_model("CosmosTransformer3DModel")
def cosmos() -> Family:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 16, 16), extra_pos_embed_type="learnable",
        concat_padding_mask=False,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "fps": 30,
    }


@zoo_model("Cosmos3OmniTransformer")
def cosmos3() -> Family:
    """One packed sequence: five words, then one image of 4 x 4 patches. It takes no batch."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=12, hidden_size=48, intermediate_size=96, latent_channel=4, latent_patch_size=2, num_attention_heads=4,
        num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=16, rope_axes_dim=(2, 2, 2), vocab_size=32,
    )  # fmt: skip
    vision = torch.arange(WORDS, WORDS + 16)
    return model, {
        "vision_tokens": [torch.randn(1, 4, 1, 8, 8)],
        "input_ids": torch.arange(WORDS),
        "text_indexes": torch.arange(WORDS),
        "position_ids": torch.arange(WORDS + 16).expand(3, -1),
        "und_len": WORDS,
        "sequence_length": WORDS + 16,
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.full((16,), 500.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


@zoo_model("DreamLiteTransformer2DModel")
def dream_lite() -> Family:
    model = diffusers.DreamLiteTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4,
        cross_attention_dim=12, qk_norm="rms_norm",
    )  # fmt: skip
    return model, {"hidden_states": latents(16, 8, 8), "encoder_hidden_states": text(12)}


@zoo_model("DualTransformer2DModel")
def dual() -> Family:
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

    model = DualTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=16, num_layers=1, norm_num_groups=4,
        cross_attention_dim=12,
    )  # fmt: skip
    model.condition_lengths = [WORDS, 3]
    return model, {"hidden_states": latents(16, 8, 8), "encoder_hidden_states": text(12, WORDS + 3)}
