"""What a sampler is to calibration and planning, and how its steps are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.errors import ConfigError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.runtime.module import LazyModule, ModelCall

Sampler = Callable[[LazyModule, int], Tensor]
"""``(denoiser, seed) -> samples``: runs a whole trajectory by calling the denoiser, from noise of that seed."""

Samplers = Sampler | Sequence[Sampler]
"""One, or several that count as one batch and run one after the other: the same seed must mean other noise to each."""


def parts_of(sample: Samplers) -> tuple[Sampler, ...]:
    """
    Raises:
        ConfigError: there is none.
    """
    parts = tuple(sample) if isinstance(sample, Sequence) else (sample,)
    if not parts or not all(map(callable, parts)):
        raise ConfigError(f"sample is {sample!r}; pass a function sample(denoiser, seed), or several of them")
    return parts


def require_finite(dense: Tensor) -> None:
    if not torch.isfinite(dense).all():
        raise ConfigError("the dense samples are not finite; check the sampler before measuring reuse")


class DenseStep:
    """Every branch computes, and nothing is cached; implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`."""

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return branch.compute(inputs)


def count_steps(lazy: LazyModule, sample: Sampler, seed: int) -> int:
    """The steps of a trajectory, found with a single evaluation: its answer stands for all, see :func:`again`."""
    answers: list[Any] = []
    steps = calls = 0

    def answer(call: ModelCall) -> Any:
        nonlocal steps, calls
        steps, calls = max(steps, call.step + 1), calls + 1
        if not answers:
            answers.append(call.run(DenseStep()))
        return again(answers[0], calls)

    with torch.no_grad(), lazy.call_handler(answer):
        sample(lazy, seed)
    return steps


def again(answer: Any, calls: int) -> Any:
    """What stands for the answer of a later call: the same, a little larger each time.

    A sampler may call twice at one timestep, as PNDM does. From the same answer these would seem one call.
    """
    scale = 1 + calls / 256
    return pytree.tree_map(lambda leaf: leaf * scale if isinstance(leaf, Tensor) else leaf, answer)
