"""NVIDIA ModelOpt: quantised first, then lazy; ModelOpt saves and restores both."""

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from components import STEPS, denoiser, inputs, outputs, show

from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.integrations import modelopt  # noqa: F401  registers the mode

model = mtq.quantize(denoiser(), mtq.INT8_DEFAULT_CFG, forward_loop=lambda model: model(**inputs()))
dense = outputs(model)
lazy = mto.apply_mode(model, [("lazy_compile", {"reuse": "linear"})])
computed = outputs(lazy)

lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
outputs(lazy)
show(dense, computed, lazy)
