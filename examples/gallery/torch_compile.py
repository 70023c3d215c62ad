"""torch.compile: a backend, for a model that cannot be replaced."""

import torch
from components import STEPS, denoiser, outputs, show

from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.integrations.dynamo import lazy_modules

model = denoiser()
dense = outputs(model)
compiled = torch.compile(model, backend="lazy_compile", options={"reuse": "linear"})
computed = outputs(compiled)

lazy = lazy_modules()[-1]
lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
outputs(compiled)
show(dense, computed, lazy)
