"""Gates that are trained, and decide for each sample."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import lazy_compile
from lazy_compile import CacheSchedule, CalibrationConfig, calibrate

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


@torch.no_grad()
def sample(model: Any, seed: int) -> torch.Tensor:
    """A sampling loop, plain Euler here; the noise depends on the seed alone."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(0, 8, 2):
        x = x - 0.1 * model(**{**inputs(step), "hidden_states": x}, return_dict=False)[0][:, :4]
    return x


lazy = lazy_compile.transform(model, inputs(0))
dense, computed = outputs(model), outputs(lazy)
start = CacheSchedule.every(2, 4, len(lazy.branches))  # left out, one is searched for: that takes longer
report = calibrate(lazy, CalibrationConfig(target_lazy_ratio=0.4, iterations=1), sample=sample, plan=start)
print("kept:", report.kept)
lazy.reset_stats()
sample(lazy, seed=77)
print("equal while nothing is reused:", torch.equal(dense, computed))
print(f"lazy ratio {lazy.stats.lazy_ratio:.2f}, compute ratio {lazy.stats.compute_ratio:.2f}")
