"""LoRA of peft, added to a model that is lazy already."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model

import lazy_compile

torch.manual_seed(0)
pipe = DiTPipeline(  # small and random; yours is DiTPipeline.from_pretrained(...)
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval(),
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval(),
    DDIMScheduler(),
)  # fmt: skip
pipe.set_progress_bar_config(disable=True)


def draw() -> torch.Tensor:
    """Two images, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe([1, 2], num_inference_steps=8, generator=generator, output_type="np").images)


lazy_compile.transform(pipe, policy="balanced")
draw()
lazy = pipe.transformer
inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), lazy.original)
draw()  # the adapted model is captured at its first call; the policy stays
reused = lazy.stats
lazy.policy = lazy_compile.AlwaysCompute()
computed = draw()
lazy_compile.restore(pipe)
print("equal while nothing is reused:", torch.equal(draw(), computed))
print(f"lazy ratio {reused.lazy_ratio:.2f}, compute ratio {reused.compute_ratio:.2f}")
