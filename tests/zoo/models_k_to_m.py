"""Small configurations of diffusers' transformers, K to M."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models import transformers
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

from zoo.inputs import BATCH, WORDS, latents, text, timestep
from zoo.parts import grid
from zoo.registry import Family, zoo_model

TEXT, HEADS, HEAD, WIDTH = 12, 2, 16, 32


@zoo_model("Kandinsky5Transformer3DModel")
def kandinsky5() -> Family:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=TEXT, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=WIDTH, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(3, 8, 8, 4),
        "encoder_hidden_states": text(TEXT),
        "timestep": timestep(),
        "pooled_projections": latents(8),
        "visual_rope_pos": (torch.arange(3), torch.arange(4), torch.arange(4)),
        "text_rope_pos": torch.arange(WORDS),
    }


def _kandinsky6(**options: Any) -> nn.Module:
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=TEXT, in_text_dim2=8, time_dim=16, model_dim=WIDTH, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=4, out_audio_dim=4, **options,
    )  # fmt: skip


def _kandinsky6_call() -> dict[str, Any]:
    return {
        "hidden_states": latents(2, 8, 8, 9),
        "encoder_hidden_states": text(TEXT),
        "pooled_projections": latents(8),
        "timestep": timestep(),
    }


@zoo_model("Kandinsky6Transformer3DModel")
def kandinsky6() -> Family:
    model = _kandinsky6(text_token_padding=True, ca_rope=True, cross_gates=True, fix_modulation=True)
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[0, -1] = False
    return model, {
        **_kandinsky6_call(),
        "audio_hidden_states": latents(6, 4),
        "encoder_attention_mask": mask,
    }


@zoo_model("Kandinsky6Transformer3DModel-video")
def kandinsky6_without_audio() -> Family:
    return _kandinsky6(), _kandinsky6_call()


@zoo_model("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr() -> Family:
    model = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=8, time_dim=16, patch_size=(1, 2, 2), model_dim=WIDTH, ff_dim=64,
        num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return model, {"hidden_states": latents(2, 16, 16, 9), "timestep": timestep()}


@zoo_model("Krea2Transformer2DModel")
def krea2() -> Family:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[:, -1] = False
    return model, {
        "hidden_states": latents(16, 16),
        "encoder_hidden_states": latents(WORDS, 3, 16),
        "timestep": timestep(0.5),
        "position_ids": torch.cat([torch.zeros(WORDS, 3), grid(4, 4)]),
        "encoder_attention_mask": mask,
    }


@zoo_model("LatteTransformer3DModel")
def latte() -> Family:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=WIDTH, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=TEXT, video_length=3,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 3, 8, 8),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(TEXT),
    }


@zoo_model("LongCatAudioDiTTransformer")
def longcat_audio() -> Family:
    model = transformers.LongCatAudioDiTTransformer(
        dit_dim=WIDTH, dit_depth=2, dit_heads=HEADS, dit_text_dim=TEXT, latent_dim=8
    )
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[0, -1] = False
    return model, {
        "hidden_states": latents(16, 8),
        "encoder_hidden_states": text(TEXT),
        "encoder_attention_mask": mask,
        "timestep": timestep(0.5),
        "attention_mask": torch.ones(BATCH, 16, dtype=torch.bool),
        "latent_cond": latents(16, 8),
    }


@zoo_model("LongCatImageTransformer2DModel")
def longcat_image() -> Family:
    model = diffusers.LongCatImageTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    return model, {
        "hidden_states": latents(16, 16),
        "encoder_hidden_states": text(TEXT),
        "timestep": timestep(0.5),
        "img_ids": grid(4, 4),
        "txt_ids": torch.zeros(WORDS, 3),
    }


@zoo_model("LTXVideoTransformer3DModel")
def ltx() -> Family:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        num_layers=2, caption_channels=TEXT,
    )  # fmt: skip
    mask = torch.ones(BATCH, WORDS, dtype=torch.long)
    mask[0, -1] = 0
    return model, {
        "hidden_states": latents(2 * 4 * 4, 8),
        "encoder_hidden_states": text(TEXT),
        "timestep": timestep(),
        "encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (1 / 25, 32, 32),
    }


def _ltx2(**options: Any) -> Family:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=HEADS, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=TEXT, rope_double_precision=False, **options,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(2 * 4 * 4, 4),
        "audio_hidden_states": latents(6, 4),
        "encoder_hidden_states": text(TEXT),
        "audio_encoder_hidden_states": text(TEXT),
        "timestep": timestep(),
        "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
        "fps": 25.0,
    }


@zoo_model("LTX2VideoTransformer3DModel")
def ltx2() -> Family:
    return _ltx2()


@zoo_model("LuminaNextDiT2DModel")
def lumina_next() -> Family:
    model = transformers.LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=WIDTH, num_layers=2, num_attention_heads=HEADS, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=TEXT,
    )  # fmt: skip
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[0, -1] = False
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep(0.5),
        "encoder_hidden_states": text(TEXT),
        "encoder_mask": mask,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD, 8, 8),
        "cross_attention_kwargs": {},
    }


@zoo_model("Lumina2Transformer2DModel")
def lumina2() -> Family:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=WIDTH, num_layers=2, num_refiner_layers=1, num_attention_heads=HEADS,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(32, 32, 32), cap_feat_dim=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep(0.5),
        "encoder_hidden_states": text(TEXT),
        "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
    }


@zoo_model("MiniMaxH3Transformer3DModel")
def minimax_h3() -> Family:
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, hidden_size=24, num_layers=2, num_refiner_layers=1,
        ffn_dim=64, in_channels=4, audio_in_channels=6, text_dim=TEXT, freq_dim=8, time_embed_hidden_dim=24,
        time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip
    audio, video = 6, 8
    tags = torch.tensor([1] * WORDS + [2] * audio + [0] * video)
    return model, {
        "hidden_states": latents(video, 16),
        "audio_hidden_states": latents(audio, 6),
        "encoder_hidden_states": text(TEXT),
        "timestep": torch.tensor([0.7, 0.3, 0.1]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(len(tags))[:, None] % torch.tensor([99.0, 4.0, 2.0]),
        "video_indices": WORDS + audio + torch.arange(video),
        "audio_indices": WORDS + torch.arange(audio),
        "text_indices": torch.arange(WORDS),
    }


@zoo_model("MiniMaxMusic3Transformer1DModel")
def minimax_music3() -> Family:
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=TEXT, num_layers=2, num_attention_heads=HEADS, attention_head_dim=HEAD,
        ff_inner_dim=64, rotary_dim=8, fourier_embedding_dim=8,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 16),
        "timestep": timestep(0.5),
        "encoder_hidden_states": latents(16, TEXT),
    }


@zoo_model("MiniMaxMusic3RVQDepthDecoder")
def minimax_music3_depth_decoder() -> Family:
    model = transformers.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=WIDTH, num_layers=2, num_attention_heads=HEADS, intermediate_size=64, audio_vocab_size=16,
        num_codebooks=4,
    )  # fmt: skip
    return model, {"inputs_embeds": latents(4, WIDTH)}


@zoo_model("MochiTransformer3DModel")
def mochi() -> Family:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=8, max_sequence_length=WORDS,
    )  # fmt: skip
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[0, -1] = False
    return model, {
        "hidden_states": latents(4, 2, 8, 8),
        "encoder_hidden_states": text(16),
        "timestep": timestep().long(),
        "encoder_attention_mask": mask,
    }


def _motif_video(**options: Any) -> Family:
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=1,
        num_single_layers=2, patch_size=2, text_embed_dim=TEXT, rope_axes_dim=(4, 6, 6), **options,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(9, 2, 8, 8),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(TEXT),
    }


@zoo_model("MotifVideoTransformer3DModel")
def motif_video() -> Family:
    return _motif_video()


@zoo_model("MotifVideoTransformer3DModel-cross")
def motif_video_with_cross_attention() -> Family:
    return _motif_video(
        num_decoder_layers=1, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True
    )
