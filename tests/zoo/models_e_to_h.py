"""diffusers' transformers from EasyAnimate to HunyuanVideo."""

from __future__ import annotations

import diffusers
import torch

from zoo.inputs import WORDS, flux_inputs, latents, text, timestep
from zoo.registry import Family, zoo_model


@zoo_model("EasyAnimateTransformer3DModel")
def easy_animate() -> Family:
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
        mmdit_layers=1, time_embed_dim=8, text_embed_dim=12,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(12),
    }


@zoo_model("ErnieImageTransformer2DModel")
def ernie_image() -> Family:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=8, out_channels=8,
        patch_size=1, text_in_dim=12, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 4, 4),
        "timestep": timestep(),
        "text_bth": text(12),
        "text_lens": torch.tensor([WORDS, WORDS]),
    }


@zoo_model("Flux2Transformer2DModel")
def flux2() -> Family:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    return model, {**flux_inputs(axes=4), "guidance": torch.full((2,), 3.5)}


@zoo_model("Flux3Transformer2DModel")
def flux3() -> Family:
    model = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=12, timestep_channels=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    return model, flux_inputs(axes=4)


@zoo_model("GlmImageTransformer2DModel")
def glm_image() -> Family:
    model = diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=12, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=20,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "prior_token_id": torch.randint(20, (2, 16)),
        "prior_token_drop": torch.tensor([False, True]),
        "timestep": timestep().long(),
        "target_size": torch.full((2, 2), 64.0),
        "crop_coords": torch.zeros(2, 2),
    }


@zoo_model("HeliosTransformer3DModel")
def helios() -> Family:
    model = diffusers.HeliosTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=96, num_layers=2, rope_dim=(4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "indices_hidden_states": torch.arange(6.0, 9.0).expand(2, -1),
        "indices_latents_history_short": torch.arange(5.0, 6.0).expand(2, -1),
        "indices_latents_history_mid": torch.arange(4.0, 5.0).expand(2, -1),
        "indices_latents_history_long": torch.arange(0.0, 4.0).expand(2, -1),
        "latents_history_short": latents(4, 1, 8, 8),
        "latents_history_mid": latents(4, 1, 8, 8),
        "latents_history_long": latents(4, 4, 8, 8),
    }


@zoo_model("HiDreamImageTransformer2DModel")
def hi_dream() -> Family:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[12, 6], text_emb_dim=10, num_routed_experts=4, num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1), force_inference_output=True,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timesteps": timestep().long(),
        "encoder_hidden_states_t5": text(12),
        "encoder_hidden_states_llama3": [text(6), text(6), text(6)],
        "pooled_embeds": torch.randn(2, 10),
    }


@zoo_model("HunyuanDiT2DModel")
def hunyuan_dit() -> Family:
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=4, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=6, text_len=WORDS,
        text_len_t5=4,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "text_embedding_mask": torch.tensor([[1.0] * WORDS, [1.0] * 3 + [0.0] * (WORDS - 3)]),
        "encoder_hidden_states_t5": text(16, 4),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(2, 1),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (torch.rand(16, 8), torch.rand(16, 8)),
    }


@zoo_model("HunyuanImageTransformer2DModel")
def hunyuan_image() -> Family:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=10, rope_axes_dim=(4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "encoder_hidden_states_2": text(10, 4),
        "encoder_attention_mask_2": torch.ones(2, 4),
    }


@zoo_model("HunyuanVideoTransformer3DModel")
def hunyuan_video() -> Family:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.full((2,), 6.0),
    }


@zoo_model("HunyuanVideo15Transformer3DModel")
def hunyuan_video15() -> Family:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=12, text_embed_2_dim=10, image_embed_dim=6, rope_axes_dim=(2, 2, 4),
        target_size=16, task_type="t2v",
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 1, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "encoder_hidden_states_2": text(10, 4),
        "encoder_attention_mask_2": torch.ones(2, 4),
        "image_embeds": torch.zeros(2, 3, 6),
    }


@zoo_model("HunyuanVideoFramepackTransformer3DModel")
def framepack() -> Family:
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True,
        image_proj_dim=6, has_clean_x_embedder=True,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "pooled_projections": torch.randn(2, 8),
        "image_embeds": latents(4, 6),
        "indices_latents": torch.arange(20, 23),
        "guidance": torch.full((2,), 6.0),
        "latents_clean": latents(4, 1, 4, 4),
        "indices_latents_clean": torch.arange(1),
        "latents_history_2x": latents(4, 4, 4, 4),
        "indices_latents_history_2x": torch.arange(4, 8),
        "latents_history_4x": latents(4, 4, 4, 4),
        "indices_latents_history_4x": torch.arange(8, 12),
    }
