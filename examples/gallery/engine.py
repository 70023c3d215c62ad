"""From a pipeline to an engine that takes the place of its transformer; here in ONNX Runtime, on a GPU in TensorRT."""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

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


dense = draw()
with tempfile.TemporaryDirectory() as folder:  # on a GPU: build=BuildConfig()
    engine = lazy_compile.export_pipeline(pipe, Path(folder) / "m.onnx", {"class_labels": [1, 2]})
computed = draw()

engine.policy = "balanced"
engine.denoiser.reset_stats()
draw()
print("equal while nothing is reused:", torch.allclose(dense, computed, atol=1e-4))  # but for rounding
print(f"lazy ratio {engine.stats.lazy_ratio:.2f}, compute ratio {engine.stats.compute_ratio:.2f}")
