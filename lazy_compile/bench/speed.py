"""How much time reuse saves: a gated model against the dense one, side by side in one run."""

from __future__ import annotations

import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lazy_compile.bench.midsize import build
from lazy_compile.bench.rows import RowFile
from lazy_compile.bench.timing import one_thread, time_in_turn
from lazy_compile.compiler import transform
from lazy_compile.config import ReuseArm
from lazy_compile.errors import import_optional
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule

REUSE = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SpeedRow:
    """One runtime at one share of scheduled reuse.

    Attributes:
        reuse_arm: what a reused branch returns, ``"linear"`` or ``"last"``.
        time_ratio: time of a gated step over that of a dense one, the median over neighbouring steps.
        quartiles: of the same ratios: the noise of the machine.
        ideal_ratio: MACs spent over dense MACs, always-on parts included.
        efficiency: measured speed-up over the ideal, ``ideal_ratio / time_ratio``.
    """

    runtime: str
    reuse_arm: str
    reuse: float
    time_ratio: float
    quartiles: tuple[float, float]
    ideal_ratio: float
    efficiency: float


def run(
    output: str | Path | None = None,
    *,
    runtimes: Sequence[str] = ("eager", "onnxruntime"),
    arms: Sequence[ReuseArm] = ("linear",),
    repeats: int = 9,
    layers: int = 12,
    heads: int = 12,
    on_progress: OnProgress = no_progress,
) -> list[SpeedRow]:
    """Measure every runtime at every share of reuse; ``bench.json`` in ``output`` is written row by row and resumed.

    On one thread: a second one makes the ratios of two ONNX Runtime sessions jump by a third.
    """
    path = None if output is None else Path(output) / "bench.json"
    settings = {"repeats": repeats, "layers": layers, "heads": heads, "threads": 1}
    rows = RowFile(path, SpeedRow, ("runtime", "reuse_arm", "reuse"), settings)
    with one_thread():
        _measure_all(rows, runtimes, arms, on_progress)
    return rows.rows


def _measure_all(
    rows: RowFile[SpeedRow], runtimes: Sequence[str], arms: Sequence[ReuseArm], on_progress: OnProgress
) -> None:
    layers, repeats = rows.settings["layers"], rows.settings["repeats"]
    model, inputs = build("DiT", layers=layers, heads=rows.settings["heads"])
    for runtime, arm in itertools.product(runtimes, arms):
        if all(rows.has(runtime=runtime, reuse_arm=arm, reuse=reuse) for reuse in REUSE):
            continue
        lazy = transform(model, inputs, reuse=arm)
        dense, gated = _PAIRS[runtime](model, lazy, inputs)
        for position, reuse in enumerate(REUSE):
            schedule = rotating_schedule(reuse, repeats + _WARM_STEPS, layers, len(lazy.branches) // layers)
            measure = partial(_measure, runtime, reuse, dense, gated(schedule), lazy, schedule, repeats)
            rows.get(measure, runtime=runtime, reuse_arm=arm, reuse=reuse)
            on_progress(f"timing {runtime}, {arm}", position + 1, len(REUSE))


_WARM_STEPS = 3


def rotating_schedule(reuse: float, steps: int, blocks: int, per_block: int) -> CacheSchedule:
    """The asked share of blocks reused in every step after the first ones, another set of them each time.

    Whole blocks, so that every step saves the same: attention costs less than an MLP.

    Args:
        reuse: share of blocks, 0 to 1.
        steps: length of the schedule.
        blocks: number of blocks.
        per_block: branches of a block, neighbours in the schedule.
    """
    table = np.ones((steps, blocks), dtype=bool)
    count = round(reuse * blocks)
    for step in range(_WARM_STEPS, steps):
        spread = (np.arange(count) * blocks // max(count, 1) + step) % blocks
        table[step, spread] = False
    return CacheSchedule(table.repeat(per_block, axis=1))


def _measure(
    runtime: str,
    reuse: float,
    dense: Callable[[], None],
    gated_steps: Iterator[None],
    lazy: LazyModule,
    schedule: CacheSchedule,
    repeats: int,
) -> SpeedRow:
    timing = time_in_turn(lambda _: dense(), lambda _: next(gated_steps), repeats=repeats, warm_steps=_WARM_STEPS)
    timed = schedule.should_compute[_WARM_STEPS:]
    macs = np.array([branch.macs for branch in lazy.branches], dtype=np.float64)
    ideal = 1.0 - float((~timed * macs).sum()) / (len(timed) * lazy.graph.total_macs)
    return SpeedRow(runtime, lazy.lazy_config.reuse, reuse, timing.ratio, timing.quartiles, ideal, ideal / timing.ratio)


def _eager(
    model: torch.nn.Module, lazy: LazyModule, inputs: dict[str, Any]
) -> tuple[Callable[[], None], Callable[[CacheSchedule], Iterator[None]]]:
    def dense() -> None:
        with torch.inference_mode():
            model(**inputs)

    def gated(schedule: CacheSchedule) -> Iterator[None]:
        lazy.policy = Scheduled(schedule)
        for step in range(schedule.steps):
            timestep = inputs["timestep"] - step
            with torch.inference_mode():
                lazy(**{**inputs, "timestep": timestep})
            yield

    return dense, gated


def _onnxruntime(
    model: torch.nn.Module, lazy: LazyModule, inputs: dict[str, Any], *, mobile: bool = False
) -> tuple[Callable[[], None], Callable[[CacheSchedule], Iterator[None]]]:
    from lazy_compile.backends.denoiser import EngineDenoiser
    from lazy_compile.backends.onnx.export import export_onnx
    from lazy_compile.backends.onnxruntime.runner import OnnxRunner

    onnxruntime = import_optional("onnxruntime", "onnx")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with tempfile.TemporaryDirectory() as folder:
        gated_file, dense_file = Path(folder) / "gated.onnx", Path(folder) / "dense.onnx"
        export_onnx(lazy, gated_file, gating="input", predictors=False, dynamic=False)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(model, kwargs=inputs, f=dense_file, dynamo=True, opset_version=20)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if mobile:
            gated_file, dense_file = (_as_ort(file) for file in (gated_file, dense_file))
        runner = OnnxRunner(gated_file, threads=1)
        session = onnxruntime.InferenceSession(dense_file, options, providers=["CPUExecutionProvider"])
    feed = {item.name: tensors[item.name].numpy() for item in session.get_inputs()}

    def dense() -> None:
        session.run(None, feed)

    def gated(schedule: CacheSchedule) -> Iterator[None]:
        denoiser = EngineDenoiser(runner, Scheduled(schedule))
        for step in range(schedule.steps):
            denoiser(**{**inputs, "timestep": inputs["timestep"] - step})
            yield

    return dense, gated


def _as_ort(onnx: Path) -> Path:
    from lazy_compile.backends.onnxruntime.mobile import convert_to_ort

    convert_to_ort(onnx, onnx.with_suffix(".ort"))
    return onnx.with_suffix(".ort")


_PAIRS: dict[str, Callable[..., tuple[Callable[[], None], Callable[[CacheSchedule], Iterator[None]]]]] = {
    "eager": _eager,
    "onnxruntime": _onnxruntime,
    "ort-mobile": partial(_onnxruntime, mobile=True),
}
