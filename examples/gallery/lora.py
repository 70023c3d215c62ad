"""LoRA of peft, added to a model that is lazy already."""

from components import STEPS, draw, pipeline, show
from peft import LoraConfig, inject_adapter_in_model

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, Scheduled

pipe = lazy_compile.transform(pipeline())
draw(pipe)
lazy = pipe.transformer
lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), lazy.original)
lazy.policy, schedule = AlwaysCompute(), lazy.policy
computed = draw(pipe)  # the next trajectory captures the adapted model

lazy.policy = schedule
draw(pipe)
show(draw(lazy_compile.restore(pipe)), computed, lazy)
