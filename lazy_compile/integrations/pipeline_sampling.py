"""diffusers pipelines as samplers: their own call, scheduler and guidance, from the noise of a seed to latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lazy_compile.errors import ConfigError, shown
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.sampling import DenseStep

Loss = Literal["latent", "decoded"] | Callable[[Tensor], Tensor]
"""What of two samples is compared, by its mean squared difference: latents; decoded samples in [0, 1]; or what a
differentiable function makes of these, such as the features of a perceptual distance."""


@dataclass(frozen=True)
class PipelineSampler:
    """Calls a pipeline whose denoisers are lazy; see :data:`~lazy_compile.runtime.sampling.Sampler`.

    Attributes:
        pipe: a diffusers pipeline.
        call: the arguments of its call.
        prompts: one sample is drawn of each; empty where ``call`` says what to draw.
        loss: what is returned of the samples.
        place: tells samplers of one pipeline apart, so that they draw other noise.
    """

    pipe: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    loss: Loss = "latent"
    place: int = 0

    def __call__(self, denoiser: object, seed: int) -> Tensor:
        """``float[B, ...]``; the noise depends on the seed alone, and for prompts on the place of each."""
        first = seed * 1_000 + self.place
        generators = [torch.Generator().manual_seed(first + row) for row in range(len(self.prompts))]
        drawn: dict[str, Any] = {"prompt": list(self.prompts), "generator": generators}
        if not self.prompts:
            drawn = {"generator": torch.Generator().manual_seed(first)}
        output_type = "latent" if self.loss == "latent" else "pt"
        with without_progress_bar(self.pipe), _last_step(self.pipe.scheduler) as stepped:
            result = self.pipe(**{"output_type": output_type, **self.call, **drawn}, return_dict=False)[0]
        if self.loss == "latent":
            return result if isinstance(result, Tensor) else _latents(self.pipe, stepped)
        if not isinstance(result, Tensor):
            raise ConfigError(
                f"{type(self.pipe).__name__} returns {type(result).__name__} for output_type='pt', which carries no "
                'gradient; plan with loss="latent"'
            )
        return result if self.loss == "decoded" else self.loss(result)


def pipeline_samplers(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[str] | None,
    loss: Loss,
    batch_size: int | None,
    repeats: int,
) -> list[PipelineSampler]:
    """All prompts, ``batch_size`` at once, each ``repeats`` times with other noise.

    Raises:
        ConfigError: there is nothing to draw, or a number is below 1.
    """
    if isinstance(prompts, str) or (prompts is not None and not all(isinstance(each, str) for each in prompts)):
        raise ConfigError(f"prompts is {shown(repr(prompts))}; expected a list of texts")
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; use 1 or more")
    if "prompt" in call:
        raise ConfigError("prompt is an argument of one call; give prompts=[...], of which one sample each is drawn")
    if prompts is not None and not prompts:
        raise ConfigError("prompts is empty; give one or more, as different as those that you will sample")
    texts = list(prompts or ())
    size = batch_size or max(len(texts), 1)
    samplers = []
    for repeat in range(repeats):
        for first in range(0, max(len(texts), 1), size):
            place = repeat * max(len(texts), 1) + first
            samplers.append(PipelineSampler(pipe, call, tuple(texts[first : first + size]), loss, place))
    return samplers


@contextmanager
def others_dense(others: Sequence[LazyModule]) -> Iterator[None]:
    """Within this context these compute everything; on the way back of gradients each of their calls is repeated."""

    def answer(call: ModelCall) -> Any:
        if not torch.is_grad_enabled():
            return call.run(DenseStep())
        return checkpoint(call.run, DenseStep(), use_reentrant=False, preserve_rng_state=False)

    with ExitStack() as stack:
        for other in others:
            stack.enter_context(other.call_handler(answer))
        yield


@contextmanager
def without_progress_bar(pipe: Any) -> Iterator[None]:
    """Without its progress bar, which would count the steps of every trajectory."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


@contextmanager
def _last_step(scheduler: Any) -> Iterator[list[Tensor]]:
    """What the scheduler returned last, for pipelines that decode whatever they are asked for."""
    latest: list[Tensor] = []
    step = scheduler.step

    def watched(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        latest[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = watched
    try:
        yield latest
    finally:
        del scheduler.step


def _latents(pipe: Any, stepped: list[Tensor]) -> Tensor:
    if not stepped:
        raise ConfigError(
            f"{type(pipe).__name__} returns no latents, and its scheduler made no step; plan its model with a sampler "
            "of your own: plan(pipe.transformer, sample, budget)"
        )
    return stepped[0]
