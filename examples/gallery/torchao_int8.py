"""torchao: int8 weights first, then lazy; bit for bit what torchao gives while nothing is reused."""

from components import STEPS, denoiser, inputs, outputs, show
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled

model = denoiser()
quantize_(model, Int8WeightOnlyConfig())
dense = outputs(model)
lazy = lazy_compile.transform(model, inputs())
computed = outputs(lazy)

lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
outputs(lazy)
show(dense, computed, lazy)
