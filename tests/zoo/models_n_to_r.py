"""Small configurations of diffusers' transformers, N to R."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models import transformers
from torch import nn

from zoo.inputs import BATCH, WORDS, latents, text, timestep
from zoo.parts import grid
from zoo.registry import Family, zoo_model

TEXT, HEADS, HEAD, WIDTH = 12, 2, 16, 32


def _nucleus(**options: Any) -> Family:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, attention_head_dim=HEAD, num_attention_heads=4, num_key_value_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6), **options,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(16, 16),
        "img_shapes": [(1, 4, 4)] * BATCH,
        "encoder_hidden_states": text(TEXT),
        "encoder_hidden_states_mask": torch.ones(BATCH, WORDS, dtype=torch.long),
        "timestep": timestep(0.5),
    }


@zoo_model("NucleusMoEImageTransformer2DModel")
def nucleus() -> Family:
    """The last but one of five blocks has experts."""
    return _nucleus(num_layers=5, num_experts=4, moe_intermediate_dim=32, capacity_factors=2.0)


@zoo_model("NucleusMoEImageTransformer2DModel-dense")
def nucleus_without_experts() -> Family:
    return _nucleus(num_layers=2, moe_enabled=False)


@zoo_model("OmniGenTransformer2DModel")
def omnigen() -> Family:
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4, hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
        num_layers=2, pad_token_id=0, vocab_size=20, pos_embed_max_size=16, time_step_dim=8,
        rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
    )  # fmt: skip
    words, patches = 20, 16
    length = words + 1 + patches
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep(0.5),
        "input_ids": torch.randint(1, 20, (BATCH, words)),
        "input_img_latents": [torch.randn(1, 4, 8, 8)],
        "input_image_sizes": {0: [[1, 1 + patches]]},
        "attention_mask": torch.ones(BATCH, length, length),
        "position_ids": torch.arange(length).expand(BATCH, length).contiguous(),
    }


@zoo_model("OvisImageTransformer2DModel")
def ovis() -> Family:
    model = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(16, 16),
        "encoder_hidden_states": text(TEXT),
        "timestep": timestep(0.5),
        "img_ids": grid(4, 4),
        "txt_ids": torch.zeros(WORDS, 3),
    }


@zoo_model("PriorTransformer")
def prior() -> Family:
    model = transformers.PriorTransformer(
        num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2, embedding_dim=TEXT, num_embeddings=WORDS,
        additional_embeddings=4,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(TEXT),
        "timestep": timestep().long(),
        "proj_embedding": latents(TEXT),
        "encoder_hidden_states": text(TEXT),
        "attention_mask": torch.tensor([[True] * WORDS, [True] * (WORDS - 1) + [False]]),
    }


@zoo_model("PRXTransformer2DModel")
def prx() -> Family:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=TEXT, hidden_size=WIDTH, mlp_ratio=2.0, num_heads=HEADS, depth=2, axes_dim=[8, 8]
    )
    mask = torch.ones(BATCH, WORDS, dtype=torch.bool)
    mask[0, -1] = False
    return model, {
        "hidden_states": latents(4, 8, 8),
        "timestep": timestep(0.5),
        "encoder_hidden_states": text(TEXT),
        "attention_mask": mask,
    }


def _qwen(**options: Any) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6), **options,
    )  # fmt: skip


def _qwen_call() -> dict[str, Any]:
    return {
        "hidden_states": latents(16, 16),
        "encoder_hidden_states": text(TEXT),
        "encoder_hidden_states_mask": torch.ones(BATCH, WORDS, dtype=torch.long),
        "timestep": timestep(0.5),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }


@zoo_model("QwenImageTransformer2DModel")
def qwen_image() -> Family:
    return _qwen(), _qwen_call()


@zoo_model("QwenImageTransformer2DModel-edit")
def qwen_image_edit() -> Family:
    """A reference image behind the noisy one, modulated as if it were free of noise."""
    call = _qwen_call()
    return _qwen(zero_cond_t=True), {
        **call,
        "hidden_states": latents(16 + 4, 16),
        "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * BATCH,
    }


@zoo_model("QwenImage21Transformer2DModel")
def qwen_image21() -> Family:
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        context_in_dim=TEXT, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    slots = torch.tensor([False] * WORDS + [True] * 4)
    return model, {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(TEXT),
        "encoder_hidden_states_mask": torch.ones(BATCH, WORDS, dtype=torch.long),
        "timestep": timestep(0.5),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
        "img_mask": slots.expand(BATCH, -1).contiguous(),
    }


@zoo_model("RFD4ProteinaTransformer")
def rfd4() -> Family:
    model = transformers.RFD4ProteinaTransformer(
        nlayers=3, token_dim=WIDTH, nheads=HEADS, dim_cond=16, pair_repr_dim=16, latent_dim=8, token_type_emb_dim=8,
        t_emb_dim=16, tri_mult_c=16, num_sequence_classes=20,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
    )  # fmt: skip
    residues = 8
    everywhere = torch.ones(BATCH, residues, dtype=torch.bool)
    return model, {
        "bb_ca": latents(residues, 3),
        "local_latents": latents(residues, 8),
        "bb_ca_time": timestep(0.5),
        "local_latents_time": timestep(0.5),
        "padding_mask": everywhere,
        "token_type": torch.zeros(BATCH, residues, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": ~everywhere, "supports_local_latent": everywhere},
    }
