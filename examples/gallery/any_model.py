"""Any torch.nn.Module, and gates that decide for each sample."""

from typing import Any

import torch
from components import STEPS, denoiser, inputs, outputs, show

import lazy_compile
from lazy_compile import CacheSchedule, CalibrationConfig, calibrate


@torch.no_grad()
def sample(model: Any, seed: int) -> torch.Tensor:
    """A sampling loop of your own, plain Euler here; the noise depends on the seed alone."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(0, STEPS, 2):
        x = x - 0.1 * model(**{**inputs(step), "hidden_states": x}, return_dict=False)[0][:, :4]
    return x


model = denoiser()
lazy = lazy_compile.transform(model, inputs())
computed = outputs(lazy)
start = CacheSchedule.every(2, STEPS // 2, len(lazy.branches))  # left out, one is searched for: that takes longer
report = calibrate(lazy, CalibrationConfig(target_lazy_ratio=0.4, iterations=1), sample=sample, plan=start)
print("kept:", report.kept)
lazy.reset_stats()
sample(lazy, seed=77)
show(outputs(model), computed, lazy)
