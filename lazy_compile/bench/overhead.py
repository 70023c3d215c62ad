"""What a transformed model costs while nothing is reused, against the original in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazy_compile.bench.midsize import MIDSIZE, build, later
from lazy_compile.bench.timing import one_thread, time_in_turn
from lazy_compile.compiler import transform
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.model_call import ModelCall
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import save_json

_WARM_STEPS = 2
_BEFORE_REUSE = 4  # two calls learn which inputs stay the same; two outputs make a line


@dataclass(frozen=True)
class OverheadRow:
    """One model in PyTorch eager, every branch computed at every step and kept for linear reuse.

    Attributes:
        parameters: of the model.
        branches: how many are gated.
        original_ms: median processor time of a call of the original.
        lazy_ms: median processor time of a call of the transformed model; the two are called in turn.
        ratio: lazy over original, the median over neighbouring calls.
        quartiles: of the same ratios: the noise of the machine.
        bitwise_equal: whether the two gave the same numbers.
        computing_us: what a branch that computes adds to its bare graph, in microseconds: all that a call does around
            its tensors, over the number of branches.
        reusing_us: the same for a branch that is reused along its line.
    """

    model: str
    parameters: int
    branches: int
    original_ms: float
    lazy_ms: float
    ratio: float
    quartiles: tuple[float, float]
    bitwise_equal: bool
    computing_us: float
    reusing_us: float


def run(
    output: str | Path | None = None,
    *,
    models: Sequence[str] = ("tiny", *MIDSIZE),
    repeats: int = 15,
    on_progress: OnProgress = no_progress,
    **sizes: int,
) -> list[OverheadRow]:
    """Measure each of ``models`` on one thread; writes ``overhead.json`` into ``output`` if that is given.

    Args:
        output: a folder.
        models: names in :data:`~lazy_compile.bench.midsize.MIDSIZE`, or ``"tiny"``: 95 branches without work.
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
        answering("original", model),
        answering("lazy", lazy),
        repeats=repeats,
        warm_steps=_WARM_STEPS,
        clock=time.process_time,
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
        *(_added_us(lazy, inputs, repeats, reuses) for reuses in (False, True)),
    )


def _added_us(lazy: LazyModule, inputs: dict[str, Any], repeats: int, reuses: bool) -> float:
    """What a lazy call takes longer than its graph alone, in which every branch computes, or repeats two tensors."""
    table = np.ones((repeats + _BEFORE_REUSE, len(lazy.branches)), dtype=bool)
    table[_BEFORE_REUSE:] = not reuses
    lazy.policy = Scheduled(CacheSchedule(table))
    bare, calls = _BareStep(), list[ModelCall]()

    def keep(call: ModelCall) -> Any:
        calls.append(call)
        return call.run(bare)

    def lazy_step(step: int) -> None:
        with torch.inference_mode(), lazy.trajectory("overhead", step=step):
            lazy(**later(inputs, step))

    def bare_step(step: int) -> None:
        with torch.inference_mode():
            calls[-1].run(bare)

    with lazy.call_handler(keep):
        for step in range(_BEFORE_REUSE):
            lazy_step(step)
    bare.reuses = reuses
    timing = time_in_turn(bare_step, lazy_step, repeats=repeats, warm_steps=_BEFORE_REUSE, clock=time.process_time)
    return 1e3 * timing.difference_ms / len(lazy.branches)


class _BareStep:
    """Does what must be done, and decides nothing; see :class:`~lazy_compile.ir.lazy_branch.LazyStep`."""

    def __init__(self) -> None:
        self.reuses = False
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        if self.reuses:
            return tuple([torch.lerp(value, value, -1.0) for value in self._kept[branch.index]])
        outputs = self._kept[branch.index] = branch.compute(inputs)
        return outputs
