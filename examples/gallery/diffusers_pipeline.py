"""A diffusers pipeline: one line, and the pipeline is called as before."""

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from small import STEPS, draw, pipeline, show

pipe = pipeline()
dense = draw(pipe)
lazy_compile.transform(pipe)
computed = draw(pipe)

lazy = pipe.transformer
lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
draw(pipe)
show(dense, computed, lazy)
lazy_compile.restore(pipe)
