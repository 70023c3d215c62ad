"""A server with continuous batching: at each tick all running requests make one step, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.layers import TOKENS, WIDTH


@dataclass
class Request:
    """One trajectory of Euler steps from its own noise.

    Attributes:
        name: what the server calls it.
        steps: how many it takes.
        arrives: the tick from which it waits.
    """

    name: str
    steps: int = 6
    arrives: int = 0

    def __post_init__(self) -> None:
        seed = sum(map(ord, self.name))
        self.x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.step = 0

    @property
    def time(self) -> float:
        return 1000.0 * (1 - self.step / self.steps)


@torch.no_grad()
def serve(
    model: Callable[..., Any], requests: Sequence[Request], batch: int = 3, told: Callable[..., Any] | None = None
) -> list[Tensor]:
    """Sample all of them, at most ``batch`` at a time; rows come and go. Returns the samples in the order given.

    Args:
        told: ``lazy.trajectory``, if the server says which row belongs to which request.
    """
    waiting, running, tick = list(requests), list[Request](), 0
    while waiting or running:
        arrived = [request for request in waiting if request.arrives <= tick][: batch - len(running)]
        waiting = [request for request in waiting if request not in arrived]
        running = [*arrived, *running][::-1]  # rows change places as well
        if running:
            x = torch.cat([request.x for request in running])
            t = torch.tensor([request.time for request in running])
            names, steps = [request.name for request in running], [request.step for request in running]
            with told(names, step=steps) if told else nullcontext():
                predicted = model(x, t)
            for request, row in zip(running, predicted, strict=True):
                request.x = request.x - row[None] / request.steps
                request.step += 1
            if told:
                model.end_trajectory(*[request.name for request in running if request.step == request.steps])
            running = [request for request in running if request.step < request.steps]
        tick += 1
    return [request.x for request in requests]
