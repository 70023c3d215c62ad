"""What a model with spans must return, found without the package: hooks on the blocks of the original.

A span is a run of modules. What goes into the first and what comes out of the last are its streams. A span that reuses
returns what goes in now plus the difference that it kept, extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Streams = dict[str, Tensor]
Kept = list[tuple[int, Streams]]


class SpanOracle:
    """Calls ``model`` step by step as a lazy model with spans would.

    Args:
        model: the original; its hooks are taken off again after every call.
        spans: the path of the first and the last module of each.
        enter: ``(args, kwargs)`` of a first module -> the streams that go in, by name.
        leave: result of a last module -> its streams, by the same names.
        rebuild: streams and the result -> the result with these streams.
        should_compute: ``bool[steps, spans]``.
        order: of the extrapolation.
    """

    def __init__(
        self,
        model: nn.Module,
        spans: Sequence[tuple[str, str]],
        enter: Callable[[tuple[Any, ...], dict[str, Any]], Streams],
        leave: Callable[[Any], Streams],
        rebuild: Callable[[Streams, Any], Any],
        should_compute: np.ndarray,
        order: int,
    ) -> None:
        self.model, self.spans, self.order = model, spans, order
        self.enter, self.leave, self.rebuild = enter, leave, rebuild
        self.should_compute = should_compute
        self.kept: list[Kept] = [[] for _ in spans]
        self.step = 0

    @torch.no_grad()
    def __call__(self, **arguments: Any) -> Any:
        entered: dict[int, Streams] = {}
        with ExitStack() as hooks:
            for index, (first, last) in enumerate(self.spans):

                def note(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                    entered[index] = self.enter(args, kwargs)

                def replace(_: nn.Module, __: Any, result: Any, index: int = index) -> Any:
                    return self._result(index, entered[index], result)

                pre = self.model.get_submodule(first).register_forward_pre_hook(note, with_kwargs=True)
                post = self.model.get_submodule(last).register_forward_hook(replace)
                hooks.callback(pre.remove)
                hooks.callback(post.remove)
            result = self.model(**arguments)
        self.step += 1
        return result

    def run(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        return [self(**arguments) for arguments in calls]

    def _result(self, index: int, entered: Streams, result: Any) -> Any:
        known = self.kept[index]
        streams = self.leave(result)
        if not known or self.should_compute[self.step, index]:
            known.insert(0, (self.step, {name: value - entered[name] for name, value in streams.items()}))
            del known[self.order + 1 :]
            return result
        places = [at for at, _ in known]
        reused = {}
        for name, stream in streams.items():
            change = extrapolated(places, [kept[name].double() for _, kept in known], self.step)
            reused[name] = (entered[name].double() + change).to(stream.dtype)
        return self.rebuild(reused, result)


def extrapolated(places: Sequence[int], values: Sequence[Tensor], at: int) -> Tensor:
    """Along polynomials through one value more at a time: what the second, third, ... adds to the one before it counts
    whole, a half, a quarter."""
    total, before = values[0], values[0]
    for count in range(2, len(values) + 1):
        weights = [math.prod((at - q) / (p - q) for q in places[:count] if q != p) for p in places[:count]]
        through = sum(weight * value for weight, value in zip(weights, values, strict=False))
        total = total + 0.5 ** (count - 2) * (through - before)
        before = through
    return total
