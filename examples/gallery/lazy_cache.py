"""In the manner of diffusers' enable_cache: the model stays the same object."""

from components import STEPS, draw, pipeline, show

from lazy_compile import CacheSchedule, LazyConfig, Scheduled, apply_lazy_cache

pipe = pipeline()
dense = draw(pipe)
lazy = apply_lazy_cache(pipe.transformer, LazyConfig(reuse="last"))
computed = draw(pipe)

lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
draw(pipe)
show(dense, computed, lazy)
pipe.transformer.disable_lazy_cache()
