"""What ``torch.compile`` makes of a lazy model and of the dense one: four ways to take a step, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.utils import fresh_cache

from lazy_compile.bench.midsize import build, later
from lazy_compile.bench.rows import RowFile
from lazy_compile.bench.speed import rotating_schedule
from lazy_compile.bench.timing import all_in_turn, one_thread
from lazy_compile.compiler import transform
from lazy_compile.config import Granularity
from lazy_compile.errors import VerificationError
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule

REUSE = (0.0, 0.25, 0.5, 0.75)
MODELS = ("DiT", "FLUX")
GRANULARITIES: tuple[Granularity, ...] = ("branch", "block")
_WARM_STEPS = 4


@dataclass(frozen=True)
class CompileRow:
    """One model at one granularity and share of scheduled reuse. Times are medians of the processor time of a step, on
    one thread.

    Attributes:
        granularity: what is decided and cached as one, see :class:`~lazy_compile.config.LazyConfig`.
        reuse: share of branches that are reused, whole blocks where the number of blocks allows it.
        compiled_ratio: lazy compiled over dense compiled, the median over neighbouring steps.
        quartiles: of the same ratios.
        ideal_ratio: MACs spent over dense MACs, always-on parts included.
        efficiency: measured speed-up over the ideal, ``ideal_ratio / compiled_ratio``.
        dense_graphs, lazy_graphs: graphs that the backend compiled, for all shares of reuse so far.
        dense_compile_s, lazy_compile_s: wall time that Dynamo took for them, from empty caches.
        compiled_calls: how often a step of the lazy model runs one of its compiled graphs, the mean.
        error: largest difference between lazy compiled and lazy eager, per unit of the largest value.
    """

    model: str
    granularity: Granularity
    parameters: int
    branches: int
    reuse: float
    dense_eager_ms: float
    dense_compiled_ms: float
    lazy_eager_ms: float
    lazy_compiled_ms: float
    compiled_ratio: float
    quartiles: tuple[float, float]
    ideal_ratio: float
    efficiency: float
    dense_graphs: int
    lazy_graphs: int
    dense_compile_s: float
    lazy_compile_s: float
    compiled_calls: float
    error: float


def run(
    output: str | Path | None = None,
    *,
    models: Sequence[str] = MODELS,
    granularities: Sequence[Granularity] = GRANULARITIES,
    reuse: Sequence[float] = REUSE,
    repeats: int = 8,
    layers: int | None = None,
    backend: str = "inductor",
    on_progress: OnProgress = no_progress,
) -> list[CompileRow]:
    """Measure each model at each granularity and share of reuse; ``compile.json`` in ``output`` is written row by row
    and resumed.

    Args:
        output: a folder.
        models: names in :data:`~lazy_compile.bench.midsize.MIDSIZE`.
        granularities: those of :class:`~lazy_compile.config.LazyConfig`.
        reuse: shares of branches.
        repeats: steps of each that are timed.
        layers: other than those of about 100 million parameters.
        backend: of ``torch.compile``.
        on_progress: told of every row.

    Raises:
        VerificationError: compiled graphs were not compiled, or did not run.
    """
    settings = {"repeats": repeats, "layers": layers, "backend": backend, "threads": 1}
    path = None if output is None else Path(output) / "compile.json"
    rows = RowFile(path, CompileRow, ("model", "granularity", "reuse"), settings)
    total = len(models) * len(granularities) * len(reuse)
    with one_thread(), fresh_cache():
        for name, granularity in product(models, granularities):
            if all(rows.has(model=name, granularity=granularity, reuse=share) for share in reuse):
                continue
            bench = _Bench(name, granularity, {} if layers is None else {"layers": layers}, backend)
            for share in reuse:
                measure = partial(bench.measure, share, repeats)
                rows.get(measure, model=name, granularity=granularity, reuse=share)
                on_progress("timing compiled models", len(rows.rows), total)
    return rows.rows


class CountingBackend:
    """A backend of ``torch.compile`` that counts what it compiles, and how often that runs.

    Args:
        name: the backend that does it.

    Attributes:
        graphs: how many were compiled.
        calls: how often compiled graphs ran.
    """

    def __init__(self, name: str) -> None:
        self._compile = lookup_backend(name)
        self.graphs = self.calls = 0

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = self._compile(graph_module, inputs)
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return compiled(*arguments)

        return run


class _Bench:
    """One model four times: dense and lazy, eager and compiled; the two lazy ones share nothing."""

    def __init__(self, name: str, granularity: Granularity, sizes: dict[str, int], backend: str) -> None:
        self.name, self.granularity = name, granularity
        self.model, self.inputs = build(name, **sizes)
        self.of_dense, self.of_lazy = CountingBackend(backend), CountingBackend(backend)
        self.eager, self.compiled = (transform(self.model, self.inputs, granularity=granularity) for _ in range(2))
        self.compiled.compile(backend=self.of_lazy)
        self.dense = torch.compile(self.model, backend=self.of_dense)
        self.lazy_compile_s = 0.0
        start = _seconds_compiling()
        self._call(self.dense, 0)
        self.dense_compile_s = _seconds_compiling() - start

    def measure(self, reuse: float, repeats: int) -> CompileRow:
        schedule = _schedule(self.eager, reuse, repeats + _WARM_STEPS)
        for each in (self.eager, self.compiled):
            each.policy = Scheduled(schedule)
        error = self._warm_up(schedule)
        acts: dict[str, Callable[[int], object]] = {
            "dense eager": lambda step: self._call(self.model, step),
            "dense compiled": lambda step: self._call(self.dense, step),
            "lazy compiled": lambda step: self._call(self.compiled, step),
            "lazy eager": lambda step: self._call(self.eager, step),
        }
        calls = self.of_dense.calls, self.of_lazy.calls
        taken = all_in_turn(acts, repeats=repeats, warm_steps=_WARM_STEPS, clock=time.process_time)
        dense_calls, lazy_calls = self.of_dense.calls - calls[0], self.of_lazy.calls - calls[1]
        if not dense_calls or not lazy_calls:
            raise VerificationError(
                f"{self.name} ran {dense_calls} compiled graphs of the dense model and {lazy_calls} of the lazy one; "
                "both were to run compiled, see TORCH_LOGS=graph_breaks,recompiles"
            )
        ratios = [b / a for a, b in zip(taken["dense compiled"], taken["lazy compiled"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ideal = _ideal_ratio(self.eager, schedule)
        medians = {f"{name.replace(' ', '_')}_ms": statistics.median(times) for name, times in taken.items()}
        return CompileRow(
            model=self.name,
            granularity=self.granularity,
            parameters=sum(item.numel() for item in self.model.parameters()),
            branches=len(self.eager.branches),
            reuse=reuse,
            **medians,
            compiled_ratio=middle,
            quartiles=(low, high),
            ideal_ratio=ideal,
            efficiency=ideal / middle,
            dense_graphs=self.of_dense.graphs,
            lazy_graphs=self.of_lazy.graphs,
            dense_compile_s=self.dense_compile_s,
            lazy_compile_s=self.lazy_compile_s,
            compiled_calls=lazy_calls / (repeats + _WARM_STEPS),
            error=error,
        )

    def _warm_up(self, schedule: CacheSchedule) -> float:
        """Compile what all steps run on; how far compiled and eager outputs of the lazy model differ."""
        start = _seconds_compiling()
        outputs = [self._call(self.compiled, step) for step in range(schedule.steps)]
        self.lazy_compile_s += _seconds_compiling() - start
        expected = [self._call(self.eager, step) for step in range(_WARM_STEPS + 2)]
        for each in (self.compiled, self.eager):
            each.reset()
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, expected, strict=False))

    def _call(self, denoiser: nn.Module | Callable[..., Any], step: int) -> Any:
        inputs = later(self.inputs, step)
        with torch.inference_mode():
            if isinstance(denoiser, LazyModule):
                with denoiser.trajectory("bench", step=step):
                    return denoiser(**inputs)[0]
            return denoiser(**inputs)[0]


def _ideal_ratio(lazy: LazyModule, schedule: CacheSchedule) -> float:
    timed = schedule.should_compute[_WARM_STEPS:]
    macs = np.array([branch.macs for branch in lazy.branches], dtype=np.float64)
    return 1.0 - float((~timed * macs).sum()) / (len(timed) * lazy.graph.total_macs)


def _seconds_compiling() -> float:
    """Wall time that Dynamo and its backends took so far, of this process."""
    return calculate_time_spent()["total_wall_time"]


def _schedule(lazy: LazyModule, reuse: float, steps: int) -> CacheSchedule:
    """The share of branches reused in every step after the first ones, another set of them each time."""
    branches, spans = len(lazy.branches), lazy.lazy_config.granularity != "branch"
    per_block = 2 if not spans and branches % 2 == 0 and (reuse * branches / 2).is_integer() else 1
    return rotating_schedule(reuse, steps, branches // per_block, per_block)
