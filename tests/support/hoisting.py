"""A small model with a condition that stays the same along a trajectory, its exports with and without a prologue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, LazyConfig, Scheduled
from lazy_compile.backends.onnx.export import OnnxReport, export_onnx
from lazy_compile.backends.runner import Runner
from support.layers import MLP, TOKENS, WIDTH, WORDS, Attention, norm, sinusoid
from support.toy_models import Toy, call


class Conditioned(nn.Module):
    """One block that attends to a text, which is embedded first; ``shift`` is added to the latents and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_text, self.attn, self.cross, self.mlp = nn.Linear(WIDTH, WIDTH), Attention(), Attention(), MLP()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, shift: Tensor) -> Tensor:
        h = x + sinusoid(timestep, WIDTH).to(x.dtype)[:, None] + shift[:, None]
        text = self.condition(text, timestep)
        h = h + self.attn(norm(h))
        h = h + self.cross(norm(h), text)
        return h + self.mlp(norm(h))

    def condition(self, text: Tensor, timestep: Tensor) -> Tensor:
        return self.embed_text(text)


CONDITIONED = Toy(
    Conditioned,
    {"x": (TOKENS, WIDTH), "timestep": (), "text": (WORDS, WIDTH), "shift": (WIDTH,)},
    (("attn", "self_attention"), ("cross", "cross_attention"), ("mlp", "mlp")),
    ("attn", "cross", "mlp"),
)


def conditioned() -> tuple[nn.Module, dict[str, Any]]:
    """For the command line."""
    return CONDITIONED.model(), call(CONDITIONED)


STEPS = 6
SCHEDULE = Scheduled(CacheSchedule(np.array([[1, 1, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]]) > 0))
"""Of three distinct rows."""


class Exports:
    """What is written of one model in each gating and group size, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.lazy = lazy_compile.transform(CONDITIONED.model(), call(CONDITIONED), batch_rule="all_reuse")
        self.folder = folder
        self.made: dict[tuple[Any, ...], OnnxReport] = {}

    def report(self, gating: str, *, hoist: bool = True, group: int | str = 1, reuse: str = "linear") -> OnnxReport:
        key = gating, hoist, group, reuse
        if key not in self.made:
            self.lazy.lazy_config = LazyConfig(batch_rule="all_reuse", reuse=reuse)
            self.lazy.policy = SCHEDULE if gating == "schedule" else AlwaysCompute()
            folder = self.folder / "-".join(map(str, key))
            path = folder / ("hoisted" if gating == "schedule" else "hoisted.onnx")
            options: dict[str, Any] = {"predictors": False} if gating == "input" else {}
            options["invariants"] = ("text",) if hoist else ()
            self.made[key] = export_onnx(self.lazy, path, gating=gating, group=group, **options, dynamic=False)
        self.lazy.lazy_config = LazyConfig(batch_rule="all_reuse")
        self.lazy.policy = AlwaysCompute()
        return self.made[key]

    def path(self, gating: str, *, hoist: bool = True) -> Path:
        return self.report(gating, hoist=hoist).path


def prompts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, WORDS, WIDTH, generator=generator) for _ in range(count)]


def counted(runner: Runner) -> list[Mapping[str, Tensor]]:
    """Filled with the inputs of the prologue each time that it is computed."""
    seen: list[Mapping[str, Tensor]] = []
    prologue = runner.prologue
    assert prologue is not None
    context = prologue.context

    def watched() -> Any:
        made = context()
        run = made.run

        def note(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
            seen.append(inputs)
            run(inputs, outputs)

        made.run = note  # type: ignore[method-assign]
        return made

    prologue.context = watched  # type: ignore[method-assign]
    return seen
