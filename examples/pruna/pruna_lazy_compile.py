"""A cacher for Pruna.

import pruna_lazy_compile  # registers it: Pruna has no entry points for algorithms of others
smashed = smash(pipe, SmashConfig({"lazy_compile": {"interval": 2}}))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ConfigSpace import CategoricalHyperparameter, OrdinalHyperparameter
from diffusers import DiffusionPipeline
from pruna.algorithms import AlgorithmRegistry
from pruna.algorithms.base.pruna_base import PrunaAlgorithmBase
from pruna.algorithms.base.tags import AlgorithmTag
from pruna.engine.save import SAVE_FUNCTIONS

import lazy_compile
from lazy_compile import LazyConfig, LazyModule, Policy
from lazy_compile.policies.policy import GateQuery


@dataclass(frozen=True)
class EveryNth(Policy):
    """Computes at step 0 and every ``interval`` steps from there, in a trajectory of any length."""

    interval: int

    def should_compute(self, query: GateQuery) -> bool:
        return query.step % self.interval == 0


class LazyCompile(PrunaAlgorithmBase):
    """Branches of the denoisers are reused between steps.

    A planned schedule can be set once the smashed pipeline was called: ``smashed.transformer.policy =
    Scheduled(schedule)``. It is not saved: what is loaded again is the original pipeline, smashed anew.
    """

    algorithm_name = "lazy_compile"
    group_tags = (AlgorithmTag.CACHER,)
    references = None
    save_fn = SAVE_FUNCTIONS.save_before_apply
    tokenizer_required = processor_required = dataset_required = False
    runs_on = ("cpu", "cuda")
    compatible_before: Iterable[str] = ("diffusers_int8", "hqq_diffusers", "quanto", "torchao", "qkv_diffusers")

    def get_hyperparameters(self) -> list[Any]:
        steps = {"desc": "Steps from one computation of a branch to its next."}
        arm = {"desc": "What a skipped branch returns."}
        return [
            OrdinalHyperparameter("interval", sequence=range(1, 11), default_value=2, meta=steps),
            CategoricalHyperparameter("reuse", choices=["linear", "last"], default_value="linear", meta=arm),
        ]

    def model_check_fn(self, model: Any) -> bool:
        return isinstance(model, DiffusionPipeline)

    def _apply(self, model: Any, smash_config: Any) -> Any:
        lazy_compile.transform(model, config=LazyConfig(reuse=str(smash_config["reuse"])))
        for part in model.components.values():
            if isinstance(part, LazyModule):
                part.policy = EveryNth(int(smash_config["interval"]))
        return model


if "lazy_compile" not in {algorithm.algorithm_name for algorithm in AlgorithmRegistry.get_all_algorithms()}:
    AlgorithmRegistry.register_algorithm(LazyCompile())
