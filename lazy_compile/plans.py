"""Plans for models and for diffusers pipelines: one function for both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.diffusers_pipeline import is_pipeline, lazy_denoisers, transform_pipeline
from lazy_compile.integrations.pipeline_sampling import Loss, PipelineSampler, others_dense, pipeline_samplers
from lazy_compile.planning import estimate as estimating
from lazy_compile.planning import planner
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.estimate import PlanEstimate
from lazy_compile.planning.search import SearchOptions
from lazy_compile.planning.timings import BranchTimings
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Samplers, count_steps

logger = logging.getLogger("lazy_compile")


@overload
def plan(
    target: Any,
    sample: Samplers,
    budget: Budget,
    *,
    timings: BranchTimings | None = None,
    start: CacheSchedule | None = None,
    options: SearchOptions | None = None,
    calls: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> CacheSchedule: ...
@overload
def plan(
    target: Any,
    sample: Budget,
    *,
    prompts: Sequence[str] | None = None,
    loss: Loss = "latent",
    components: Sequence[str] | None = None,
    batch_size: int | None = None,
    repeats: int = 1,
    options: SearchOptions | None = None,
    calls: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress | None = None,
    **call: Any,
) -> dict[str, CacheSchedule]: ...
def plan(target: Any, sample: Any, budget: Any = None, **options: Any) -> Any:
    """The schedule that changes the final samples least under a budget.

    ``plan(lazy, sample, budget)`` for a model and a function that samples with it: see
    :func:`lazy_compile.planning.planner.plan`, which also names all options. Returns the schedule.

    ``plan(pipe, budget, prompts=[...], num_inference_steps=28)`` for a diffusers pipeline: one schedule for each of its
    transformers and U-Nets, which then follow it, and are made lazy if they are not. Samples are drawn by the
    pipeline's own call, with its scheduler and guidance. Returns the schedules by the names of the models.

    Args:
        target: a lazy model, an engine, or a pipeline.
        sample: runs a trajectory; of a pipeline, the budget.
        budget: what may be spent.
        options: those of :func:`lazy_compile.planning.planner.plan`, and of a pipeline:

            - ``prompts``: of each a sample is drawn. None if the call says what to draw, by embeddings, say.
            - ``loss``: what of the samples is compared: ``"latent"``, ``"decoded"``, or a differentiable function of
              decoded samples, whose values are compared by their mean squared difference.
            - ``components``: which models, by name.
            - ``batch_size``: prompts that are drawn at once; None draws all, or as many as ``max_memory`` admits. The
              plan is the same, to rounding.
            - ``repeats``: how often each prompt is drawn, with other noise.
            - all other arguments of the pipeline's call, such as ``num_inference_steps`` and ``height``.

    Raises:
        ConfigError: the budget cannot be met, samples are not finite, or the pipeline never calls its models.
        ArtifactError: the checkpoint belongs to another model, budget or options.
    """
    if is_pipeline(target):
        return _plan_pipeline(target, sample if budget is None else budget, **options)
    if budget is None:
        raise ConfigError("a model is planned with a sampler: plan(lazy, sample, Budget(...)); seen no budget")
    return planner.plan(target, sample, budget, **options)


def estimate_plan(target: Any, sample: Any = None, **options: Any) -> PlanEstimate | dict[str, PlanEstimate]:
    """What :func:`plan` will take with the same arguments, from one timed call of the model: calls, seconds, memory.

    ``estimate_plan(lazy, sample)``, or ``estimate_plan(pipe, prompts=[...], num_inference_steps=28)``, which returns
    an estimate for each model. See :func:`lazy_compile.planning.estimate.estimate_plan`.
    """
    if not is_pipeline(target):
        return estimating.estimate_plan(target, sample, **options)
    named = {key: options.pop(key) for key in ("options", "calls", "max_memory", "seed") if key in options}
    drawing = _Drawing.of(target, **options)
    found = {}
    for name, lazy in drawing.used(named.get("seed", 0)):
        with others_dense(drawing.others(name)):
            found[name] = estimating.estimate_plan(lazy, drawing.samplers, **named)
    return found


class _Drawing:
    """A pipeline, its lazy models, and the samplers that call it."""

    def __init__(self, pipe: Any, lazy: dict[str, LazyModule], samplers: list[PipelineSampler]) -> None:
        self.pipe, self.lazy, self.samplers = pipe, lazy, samplers

    @classmethod
    def of(
        cls,
        pipe: Any,
        *,
        prompts: Sequence[str] | None = None,
        loss: Loss = "latent",
        components: Sequence[str] | None = None,
        batch_size: int | None = None,
        repeats: int = 1,
        **call: Any,
    ) -> _Drawing:
        samplers = pipeline_samplers(pipe, call, prompts, loss, batch_size, repeats)
        if not lazy_denoisers(pipe):
            transform_pipeline(pipe, LazyConfig(), components)
        chosen = {name: lazy for name, lazy in lazy_denoisers(pipe).items() if components is None or name in components}
        return cls(pipe, chosen, samplers)

    def others(self, name: str) -> list[LazyModule]:
        return [lazy for other, lazy in lazy_denoisers(self.pipe).items() if other != name]

    def used(self, seed: int) -> list[tuple[str, LazyModule]]:
        """Those that the pipeline calls at two steps or more: only these have something to reuse.

        Raises:
            ConfigError: there is none.
        """
        found = []
        for name, lazy in self.lazy.items():
            with others_dense(self.others(name)):
                steps = count_steps(lazy, self.samplers[0], seed)
            if steps >= 2:
                found.append((name, lazy))
            else:
                logger.warning("%s is called at %d step(s) and keeps computing", name, steps)
        if not found:
            raise ConfigError(
                f"this call of {type(self.pipe).__name__} runs none of {', '.join(self.lazy)} at two steps or more, so "
                "that there is nothing to reuse; give num_inference_steps=20, say"
            )
        return found


def _plan_pipeline(
    pipe: Any,
    budget: Budget,
    *,
    options: SearchOptions | None = None,
    calls: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    max_patterns: int | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress | None = None,
    **drawn: Any,
) -> dict[str, CacheSchedule]:
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget is {budget!r}; pass a Budget, such as Budget(compute_ratio=0.5)")
    drawing = _Drawing.of(pipe, **drawn)
    schedules = {}
    for name, lazy in drawing.used(seed):
        with others_dense(drawing.others(name)):
            samplers = _fitting(lazy, drawing, drawn, options, calls, max_memory, seed)
            schedules[name] = planner.plan(
                lazy, samplers, budget, options=options, calls=calls, max_memory=max_memory, seed=seed,
                max_patterns=max_patterns, checkpoint=None if checkpoint is None else Path(checkpoint, name),
                on_progress=on_progress,
            )  # fmt: skip
    for name, schedule in schedules.items():
        drawing.lazy[name].policy = Scheduled(schedule)
    return schedules


def _fitting(
    lazy: LazyModule,
    drawing: _Drawing,
    drawn: dict[str, Any],
    options: SearchOptions | None,
    calls: int | None,
    max_memory: int | None,
    seed: int,
) -> list[PipelineSampler]:
    """The largest batches that keep to the memory that is allowed, if nobody says how large they are."""
    size = max(len(drawing.samplers[0].prompts), 1)
    if max_memory is None or drawn.get("batch_size") is not None:
        return drawing.samplers
    while True:
        samplers = _Drawing.of(drawing.pipe, **{**drawn, "batch_size": size}).samplers
        try:
            estimating.estimate_plan(lazy, samplers[:1], options=options, calls=calls, max_memory=max_memory, seed=seed)
        except ConfigError:
            if size == 1:
                raise
            size = (size + 1) // 2
        else:
            return samplers
