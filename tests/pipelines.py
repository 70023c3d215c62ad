"""Real diffusers pipelines of small random components, and one call of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

STEPS = 6
WORDS = 5


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments of its call, and the name of its denoiser."""

    pipe: Any
    arguments: dict[str, Any]
    denoiser: str = "transformer"

    def sample(self, **changes: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent", **self.arguments}
        self.pipe.set_progress_bar_config(disable=True)
        result = self.pipe(**{**arguments, **changes}, return_dict=False)[0]
        return torch.as_tensor(result)

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.denoiser)


def random_weights(model: nn.Module) -> nn.Module:
    """Everywhere, so that no branch contributes nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_vae() -> nn.Module:
    return random_weights(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4))


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(random_weights(model), image_vae(), diffusers.DDIMScheduler())
    return Case(pipe, {"class_labels": [1, 2], "output_type": "np"})


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(), transformer=random_weights(model),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    mask = torch.ones(1, WORDS, dtype=torch.long)
    prompts = {
        "prompt_embeds": normal(1, WORDS, 12), "negative_prompt_embeds": normal(1, WORDS, 12, seed=2),
        "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None,
    }  # fmt: skip
    return Case(pipe, {**prompts, "height": 8, "width": 8, "use_resolution_binning": False})


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        random_weights(model), diffusers.FlowMatchEulerDiscreteScheduler(), image_vae(), *[None] * 6
    )
    prompts = {
        "prompt_embeds": normal(1, WORDS, 12), "negative_prompt_embeds": normal(1, WORDS, 12, seed=2),
        "pooled_prompt_embeds": normal(1, 10), "negative_pooled_prompt_embeds": normal(1, 10, seed=2),
    }  # fmt: skip
    return Case(pipe, {**prompts, "height": 8, "width": 8})


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), image_vae(), *[None] * 4, random_weights(model)
    )
    prompts = {"prompt_embeds": normal(1, WORDS, 12), "pooled_prompt_embeds": normal(1, 10)}
    return Case(pipe, {**prompts, "height": 16, "width": 16})


def wan() -> Case:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
        transformer=random_weights(model),
    )  # fmt: skip
    prompts = {"prompt_embeds": normal(1, WORDS, 12), "negative_prompt_embeds": normal(1, WORDS, 12, seed=2)}
    return Case(pipe, {**prompts, "height": 32, "width": 32, "num_frames": 5})


def sana() -> Case:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=16, patch_size=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(None, None, vae, random_weights(model), diffusers.DPMSolverMultistepScheduler())
    mask = torch.ones(1, WORDS, dtype=torch.long)
    prompts = {
        "prompt_embeds": normal(1, WORDS, 12), "negative_prompt_embeds": normal(1, WORDS, 12, seed=2),
        "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None,
    }  # fmt: skip
    return Case(pipe, {**prompts, "height": 32, "width": 32, "use_resolution_binning": False})


def stable_diffusion() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        image_vae(), None, None, random_weights(model), _ddim(), None, None, requires_safety_checker=False
    )
    prompts = {"prompt_embeds": normal(1, WORDS, 12), "negative_prompt_embeds": normal(1, WORDS, 12, seed=2)}
    return Case(pipe, {**prompts, "height": 8, "width": 8}, "unet")


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case for case in (dit, pixart, sd3, flux, wan, sana, stable_diffusion)
}
