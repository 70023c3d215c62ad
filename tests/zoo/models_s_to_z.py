"""Small configurations of diffusers' transformers, S to Z."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models import transformers
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from zoo.inputs import BATCH, WORDS, latents, text, timestep
from zoo.registry import Family, zoo_model

TEXT, HEADS, HEAD, WIDTH = 12, 2, 16, 32


@zoo_model("SanaVideoTransformer3DModel")
def sana_video() -> Family:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        caption_channels=TEXT, sample_size=8,
    )  # fmt: skip
    mask = torch.ones(BATCH, WORDS)
    mask[0, -1] = 0
    return model, {
        "hidden_states": latents(4, 2, 8, 8),
        "encoder_hidden_states": text(TEXT),
        "timestep": timestep().long(),
        "encoder_attention_mask": mask,
    }


@zoo_model("SanaWMTransformer3DModel")
def sana_world_model() -> Family:
    """One block with gated delta rule attention, one with softmax attention, both steered by a camera."""
    frames, size = 3, 4
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS, softmax_every_n=2,
        linear_head_dim=HEAD, caption_channels=TEXT, mlp_ratio=2.0, chunk_plucker_channels=8,
        chunk_plucker_post_attn_blocks=2,
    )  # fmt: skip
    pose = torch.eye(4).repeat(BATCH, frames, 1, 1)
    pose[..., 2, 3] = 0.1 * torch.arange(frames)
    lens = torch.tensor([size, size, size / 2, size / 2]).expand(BATCH, frames, 4)
    return model, {
        "hidden_states": latents(4, frames, size, size),
        "timestep": torch.full((BATCH, 1, frames), 500.0),
        "encoder_hidden_states": latents(1, WORDS, TEXT),
        "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.long),
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": latents(8, frames, size, size),
    }


@zoo_model("SanaWMLTX2RefinerTransformer3DModel")
def sana_world_model_refiner() -> Family:
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=HEADS, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=TEXT, rope_double_precision=False,
    )  # fmt: skip
    frames, rows, columns = 2, 4, 4
    rotary = model.build_rotary_emb_for_absolute_positions(
        batch_size=BATCH, frame_positions=list(range(frames)), height=rows, width=columns, device="cpu", fps=24.0
    )
    tokens = frames * rows * columns
    return model, {
        "hidden_states": latents(tokens, 4),
        "encoder_hidden_states": text(TEXT),
        "timestep": torch.full((BATCH, tokens), 500.0),
        "video_rotary_emb": rotary,
        "encoder_attention_mask": torch.ones(BATCH, WORDS),
    }


def _skyreels(**options: Any) -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=16,
        ffn_dim=64, num_layers=2, rope_max_seq_len=16, **options,
    )  # fmt: skip


@zoo_model("SkyReelsV2Transformer3DModel")
def skyreels() -> Family:
    return _skyreels(), {
        "hidden_states": latents(4, 2, 8, 8),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(TEXT),
    }


@zoo_model("SkyReelsV2Transformer3DModel-forcing")
def skyreels_diffusion_forcing() -> Family:
    """A noise level for each frame, attention that is causal over pairs of frames."""
    return _skyreels(num_frame_per_block=2), {
        "hidden_states": latents(4, 4, 8, 8),
        "timestep": torch.tensor([[100, 300, 400, 500]] * BATCH),
        "encoder_hidden_states": text(TEXT),
        "enable_diffusion_forcing": True,
    }


@zoo_model("StableAudioDiTModel")
def stable_audio() -> Family:
    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=8, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        num_key_value_attention_heads=1, out_channels=8, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=TEXT, cross_attention_input_dim=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 16),
        "timestep": timestep(0.5),
        "encoder_hidden_states": text(TEXT),
        "global_hidden_states": latents(1, TEXT),
        "rotary_embedding": get_1d_rotary_pos_embed(HEAD // 2, 17, use_real=True, repeat_interleave_real=False),
    }


@zoo_model("StableAudio3DiTModel")
def stable_audio3() -> Family:
    model = diffusers.StableAudio3DiTModel(
        io_channels=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, cond_token_dim=TEXT, global_cond_dim=TEXT,
        local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
    )  # fmt: skip
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[0, -1] = False
    return model, {
        "hidden_states": latents(8, 16),
        "timestep": timestep(0.5),
        "encoder_hidden_states": text(TEXT),
        "global_hidden_states": latents(TEXT),
        "encoder_attention_mask": mask,
        "local_add_cond": latents(5, 16),
    }


@zoo_model("T5FilmDecoder")
def t5_film() -> Family:
    model = transformers.T5FilmDecoder(
        input_dims=8, targets_length=16, d_model=WIDTH, num_layers=2, num_heads=HEADS, d_kv=HEAD, d_ff=64
    )
    return model, {
        "decoder_input_tokens": latents(16, 8),
        "encodings_and_masks": [(text(WIDTH), torch.ones(BATCH, WORDS))],
        "decoder_noise_time": timestep(0.5),
    }


@zoo_model("Transformer2DModel")
def transformer_2d() -> Family:
    """As Stable Diffusion 1 has it at every level of its U-Net."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=16, num_layers=2, norm_num_groups=4,
        cross_attention_dim=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(16, 4, 4),
        "encoder_hidden_states": text(TEXT),
    }


@zoo_model("Transformer2DModel-vectors")
def transformer_2d_on_vectors() -> Family:
    """Discrete latents, as in VQ-Diffusion."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2, cross_attention_dim=TEXT, sample_size=4,
        num_vector_embeds=20, num_embeds_ada_norm=100, norm_type="ada_norm", attention_bias=True,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randint(20, (BATCH, 16)),
        "encoder_hidden_states": text(TEXT),
        "timestep": torch.tensor(50),
    }


@zoo_model("TransformerTemporalModel")
def transformer_temporal() -> Family:
    model = diffusers.TransformerTemporalModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=16, num_layers=2, norm_num_groups=4
    )
    frames = 3
    return model, {"hidden_states": torch.randn(BATCH * frames, 16, 4, 4), "num_frames": frames}


@zoo_model("WanAnimateTransformer3DModel")
def wan_animate() -> Family:
    model = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=12, latent_channels=4, out_channels=4,
        text_dim=TEXT, freq_dim=16, ffn_dim=64, num_layers=2, image_dim=TEXT, rope_max_seq_len=16,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    frames = 2
    return model, {
        "hidden_states": latents(12, frames + 1, 8, 8),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(TEXT),
        "encoder_hidden_states_image": text(TEXT),
        "pose_hidden_states": latents(4, frames, 8, 8),
        "face_pixel_values": latents(3, 4 * frames - 3, 16, 16),
    }


@zoo_model("WanVACETransformer3DModel")
def wan_vace() -> Family:
    model = diffusers.WanVACETransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=16,
        ffn_dim=64, num_layers=2, rope_max_seq_len=16, vace_layers=[0], vace_in_channels=8,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 2, 8, 8),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(TEXT),
        "control_hidden_states": latents(8, 2, 8, 8),
        "control_hidden_states_scale": torch.tensor([0.7]),
    }


@zoo_model("ZImageTransformer2DModel")
def z_image() -> Family:
    """Lists of images and prompts, of one size here; the model pads and packs them itself."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip
    return model, {
        "x": [torch.randn(4, 1, 8, 8) for _ in range(BATCH)],
        "t": timestep(0.5),
        "cap_feats": [torch.randn(WORDS, TEXT) for _ in range(BATCH)],
    }
