"""What a transformed model costs while nothing is reused, against the original in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lazy_compile.bench.midsize import MIDSIZE, build, later
from lazy_compile.bench.timing import one_thread, time_in_turn
from lazy_compile.compiler import transform
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import save_json

_WARM_STEPS = 2


@dataclass(frozen=True)
class OverheadRow:
    """One model in PyTorch eager, every branch computed at every step and kept for linear reuse.

    Attributes:
        parameters: of the model.
        branches: how many are gated.
        original_ms: median time of a call of the original.
        lazy_ms: median time of a call of the transformed model; the two are called in turn.
        ratio: lazy over original, the median over neighbouring calls.
        quartiles: of the same ratios: the noise of the machine.
        bitwise_equal: whether the two gave the same numbers.
    """

    model: str
    parameters: int
    branches: int
    original_ms: float
    lazy_ms: float
    ratio: float
    quartiles: tuple[float, float]
    bitwise_equal: bool


def run(
    output: str | Path | None = None,
    *,
    models: Sequence[str] = tuple(MIDSIZE),
    repeats: int = 15,
    on_progress: OnProgress = no_progress,
    **sizes: int,
) -> list[OverheadRow]:
    """Measure each of ``models`` on one thread; writes ``overhead.json`` into ``output`` if that is given.

    Args:
        output: a folder.
        models: names in :data:`~lazy_compile.bench.midsize.MIDSIZE`.
        repeats: calls of each that are timed.
        on_progress: told of every model.
        sizes: ``layers`` and ``heads`` other than those of about 100 million parameters.
    """
    rows = []
    with one_thread():
        for position, name in enumerate(models):
            model, inputs = build(name, **sizes)
            lazy = transform(model, inputs)
            rows.append(measure(name, model, lazy, inputs, repeats))
            on_progress("timing models", position + 1, len(models))
    if output is not None:
        save_json(Path(output) / "overhead.json", {"rows": [asdict(row) for row in rows]})
    return rows


def measure(name: str, model: nn.Module, lazy: LazyModule, inputs: dict[str, Any], repeats: int) -> OverheadRow:
    """Time both in turn along one trajectory; which of them goes first changes from step to step."""
    steps = repeats + _WARM_STEPS
    lazy.policy = Scheduled(CacheSchedule(np.ones((steps, len(lazy.branches)), dtype=bool)))
    answers: dict[str, Any] = {}

    def answering(who: str, denoiser: Callable[..., Any]) -> Callable[[int], None]:
        def act(step: int) -> None:
            with torch.inference_mode():
                answers[who] = denoiser(**later(inputs, step))[0]

        return act

    timing = time_in_turn(
        answering("original", model), answering("lazy", lazy), repeats=repeats, warm_steps=_WARM_STEPS
    )
    return OverheadRow(
        name,
        sum(parameter.numel() for parameter in model.parameters()),
        len(lazy.branches),
        timing.baseline_ms,
        timing.other_ms,
        timing.ratio,
        timing.quartiles,
        torch.equal(answers["original"], answers["lazy"]),
    )
