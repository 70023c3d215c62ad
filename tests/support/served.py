"""Requests as a server sees them: each asks for rows of the next call, and goes on when it has their answers.

A request is a generator of :class:`Asked` rows, so that a test may batch, reorder, repeat and abandon what it asks. The
:class:`PlainServer` answers them without the package: one row at a time, on a copy of the model whose branches are
replaced by hooks, with caches that belong to the row's own request.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from support.hoisting import Conditioned
from support.layers import TOKENS, WIDTH, WORDS
from support.oracle import Oracle
from support.toy_models import randomize

MODULES = ("attn", "cross", "mlp")
STEPS = 6


class Adapted(Conditioned):
    """Its text is scaled by an object that no module holds, as adapters keep their strength."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = SimpleNamespace(scale=1.0)

    def condition(self, text: Tensor, timestep: Tensor) -> Tensor:
        return self.adapter.scale * self.embed_text(text)


def adapted() -> nn.Module:
    return randomize(Adapted()).eval()


@dataclass(frozen=True)
class Asked:
    """One row of a call: latents ``float[TOKENS, WIDTH]``, time, text, and which condition of its request it is."""

    x: Tensor
    time: float
    text: Tensor
    shift: Tensor
    condition: int = 0


Rows = Generator[list[Asked], list[Tensor], None]


def joined(rows: Sequence[Asked]) -> dict[str, Tensor]:
    """The arguments of one call."""
    return {
        "x": torch.stack([row.x for row in rows]),
        "timestep": torch.tensor([row.time for row in rows]),
        "text": torch.stack([row.text for row in rows]),
        "shift": torch.stack([row.shift for row in rows]),
    }


@dataclass(frozen=True)
class Kind:
    """How a request samples.

    Attributes:
        noise: seed of its first latents, and of all that its sampler draws.
        texts: seeds of its conditional and unconditional text.
        sampler: one of ``SAMPLERS``.
        guidance: one of ``GUIDANCES``.
        start: the first of its steps, as image-to-image begins late.
    """

    noise: int = 0
    texts: tuple[int, int] = (0, 1)
    sampler: str = "euler"
    guidance: str = "none"
    start: int = 0

    def rows(self) -> Rows:
        generator = torch.Generator().manual_seed(self.noise)
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        shift = 0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))
        texts = [torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in self.texts]
        times = np.linspace(999.0, 0.0, STEPS + 1)[self.start :]
        for index, (time, following) in enumerate(pairwise(times)):
            move = float(time - following) / 1000.0
            v = yield from self._guided(x, float(time), texts, shift, index)
            if self.sampler == "heun" and following > 0:
                w = yield from self._guided(x - move * v, float(following), texts, shift, index)
                v = 0.5 * (v + w)
            x = x - move * v
            if self.sampler == "ancestral":
                x = 0.9 * x + 0.3 * torch.randn(x.shape, generator=generator)

    def _guided(
        self, x: Tensor, time: float, texts: Sequence[Tensor], shift: Tensor, index: int
    ) -> Generator[list[Asked], list[Tensor], Tensor]:
        conditional, unconditional = (Asked(x, time, text, shift, number) for number, text in enumerate(texts))
        is_guided = {"none": False, "toggled": index % 3 != 1, "late": index >= 2}.get(self.guidance, True)
        if not is_guided:
            (v,) = yield [conditional]
            return v
        if self.guidance == "batched":
            u, v = yield [unconditional, conditional]
        elif self.guidance == "conditional first":
            (v,) = yield [conditional]
            (u,) = yield [unconditional]
        else:
            (u,) = yield [unconditional]
            (v,) = yield [conditional]
        return u + 2.0 * (v - u)


SAMPLERS = ("euler", "heun", "ancestral")
GUIDANCES = ("none", "batched", "conditional first", "unconditional first", "toggled", "late")


@dataclass(eq=False)
class Served:
    """A request that is being served; ``asked`` is what it waits for, None once it has ended."""

    kind: Kind
    number: int = field(default_factory=count().__next__)
    asked: list[Asked] | None = field(init=False)

    def __post_init__(self) -> None:
        self._rows = self.kind.rows()
        self.asked = next(self._rows)

    def answer(self, outputs: list[Tensor]) -> None:
        try:
            self.asked = self._rows.send(outputs)
        except StopIteration:
            self.asked = None


class PlainServer:
    """Answers rows one by one, as if their request were alone.

    Args:
        model: copied; ``edit`` changes the copy as a test changes the original.
        reuse: of the branches that do not compute.
    """

    def __init__(self, model: nn.Module, reuse: str) -> None:
        self.model, self.reuse = copy.deepcopy(model), reuse
        self.table = np.ones((1, len(MODULES)), dtype=bool)
        self.steps: dict[int, tuple[int, float, Tensor]] = {}
        self.streams: dict[tuple[int, int, float], Oracle] = {}

    def set_table(self, table: np.ndarray) -> None:
        self.table = table
        self.forget()

    def forget(self) -> None:
        """Every request starts anew."""
        self.steps, self.streams = {}, {}

    def edit(self, change: Callable[[nn.Module], None]) -> None:
        change(self.model)

    def step_of(self, request: Served, row: Asked) -> int:
        """Which call of its trajectory a row makes: rows of the same latents and time are one."""
        step, time, x = self.steps.get(request.number, (-1, row.time, row.x))
        if step < 0 or time != row.time or not torch.equal(x, row.x):
            step += 1
        self.steps[request.number] = (step, row.time, row.x)
        return step

    def answer(self, request: Served, row: Asked) -> Tensor:
        step = self.step_of(request, row)
        key = request.number, row.condition, self.model.adapter.scale
        oracle = self.streams.setdefault(key, Oracle(self.model, MODULES, self._decide, self.reuse))
        oracle.step = step
        result: Any = oracle(**joined([row]))
        return result[0]

    def _decide(self, step: int, branch: int, entry: Tensor) -> list[bool]:
        return [bool(self.table[min(step, len(self.table) - 1), branch])]
