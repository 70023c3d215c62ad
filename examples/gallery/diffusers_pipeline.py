"""A diffusers pipeline: one line, and the pipeline is called as before."""

from components import STEPS, draw, pipeline, show

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled

pipe = pipeline()
dense = draw(pipe)
lazy_compile.transform(pipe)
computed = draw(pipe)

lazy = pipe.transformer
lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
draw(pipe)
show(dense, computed, lazy)
lazy_compile.restore(pipe)
