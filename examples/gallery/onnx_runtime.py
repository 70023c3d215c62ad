"""ONNX Runtime, and its format for phones: truly conditional branches, the caches outside."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import lazy_compile
from lazy_compile import AlwaysCompute
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
from lazy_compile.backends.open_runner import open_runner

torch.manual_seed(0)
model = DiTTransformer2DModel(  # small and random; yours is DiTTransformer2DModel.from_pretrained(...)
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
    patch_size=2, num_embeds_ada_norm=1000,
).eval()  # fmt: skip
noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])


def inputs(step: int) -> dict[str, Any]:
    return {"hidden_states": noise, "timestep": torch.full((2,), 900 - 100 * step), "class_labels": labels}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Eight steps of a trajectory."""
    return torch.stack([model(**inputs(step), return_dict=False)[0] for step in range(8)])


dense = outputs(model)
lazy = lazy_compile.transform(model, inputs(0))
with tempfile.TemporaryDirectory() as folder:
    lazy_compile.export_onnx(lazy, Path(folder) / "m.onnx")
    convert_to_ort(Path(folder) / "m.onnx", Path(folder) / "m.ort")
    engine = EngineDenoiser(open_runner(Path(folder) / "m.ort"))

engine.policy = AlwaysCompute()
computed = outputs(engine)
engine.policy = "balanced"
engine.reset_stats()
outputs(engine)
print("equal while nothing is reused:", torch.allclose(dense, computed, atol=1e-4))  # but for rounding
print(f"lazy ratio {engine.stats.lazy_ratio:.2f}, compute ratio {engine.stats.compute_ratio:.2f}")
