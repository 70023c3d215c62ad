"""torchao: int8 weights first, then lazy; bit for bit what torchao gives while nothing is reused."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lazy_compile

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


quantize_(model, Int8WeightOnlyConfig())
dense = outputs(model)
lazy = lazy_compile.transform(model)
computed = outputs(lazy)

lazy.policy = "balanced"
outputs(lazy)
print("equal while nothing is reused:", torch.equal(dense, computed))
print(f"lazy ratio {lazy.stats.lazy_ratio:.2f}, compute ratio {lazy.stats.compute_ratio:.2f}")
