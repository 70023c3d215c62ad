"""A model that is quick to capture, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import LazyModule, Policy
from lazy_compile.policies.policy import GateQuery
from support.layers import MLP, TOKENS, WIDTH, Attention, norm, sinusoid
from support.toy_models import Toy, call

STEPS = 6


class Small(nn.Module):
    """One attention and one MLP: quick to capture."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks(self.enter(x, t))

    def enter(self, x: Tensor, t: Tensor) -> Tensor:
        return x + sinusoid(t, WIDTH).to(x.dtype)[:, None]

    def blocks(self, h: Tensor) -> Tensor:
        h = h + self.attn(norm(h))
        return h + self.mlp(norm(h))


SMALL = Toy(Small, {"x": (TOKENS, WIDTH), "t": ()}, (("attn", "self_attention"), ("mlp", "mlp")), ("attn", "mlp"), "t")
RISING = replace(SMALL, rising=True)


class Decides(Policy):
    """Asks a function of step, branch and rows."""

    def __init__(self, decide: Callable[[int, int], Any]) -> None:
        self.decide = decide
        self.timesteps: list[float] = []

    def should_compute(self, query: GateQuery) -> bool | Tensor:
        self.timesteps.append(query.timestep)
        answer = self.decide(query.step, query.branch.index)
        return answer if isinstance(answer, bool) else torch.as_tensor(answer)


NEVER = Decides(lambda step, branch: False)
ALWAYS = Decides(lambda step, branch: True)
"""Computes, and may reuse what it cached at any step, as far as anybody knows."""


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [model(**arguments) for arguments in calls]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def reused(lazy: LazyModule) -> list[list[float]]:
    return lazy.stats.reuse_table.tolist()


def fresh(**options: Any) -> LazyModule:
    """A small model of its own, whose weights a test may change."""
    return lazy_compile.transform(SMALL.model(), call(SMALL), **options)


class Wraps(nn.Module):
    """The small model, called in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small()
