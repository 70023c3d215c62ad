"""How much time reuse saves on this machine: ``python examples/gpu_measure/measure.py``, see README.md here.

Ratios are of medians that were taken in turn, dense and gated, in one run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runtimes import REUSE, Arm, Case, arms, mask_of
from shapes import FULL, SMALL, make

import lazy_compile
from lazy_compile import CacheSchedule
from lazy_compile.storage import save_json

WARM = 4
"""Steps before the clock starts: kernels are chosen, graphs captured and caches filled."""


@dataclass(frozen=True)
class Row:
    """One way to run one model, at one share of reuse.

    Attributes:
        gates: how many decide.
        dense_ms: median of a step without gates, taken in turn with the gated one.
        gated_ms: median of a step.
        ratio: gated over dense.
        ideal: MACs spent over dense MACs.
    """

    model: str
    runtime: str
    gating: str
    group: str
    gates: int
    reuse: float
    dense_ms: float
    gated_ms: float
    ratio: float
    ideal: float


@dataclass(frozen=True)
class Verdict:
    """What a set of rows says about its conditionals.

    Attributes:
        gate_us: microseconds that a gate costs while everything computes.
        skipped: share of the time of a step that full reuse saves, over the share that its MACs promise: 1 means that
            only the arm that is taken costs anything, 0 that both cost their sum.
    """

    model: str
    runtime: str
    gating: str
    group: str
    gate_us: float
    skipped: float


def measure(case: Case, name: str, arm: Arm, repeats: int) -> Iterator[Row]:
    leaders = case.lazy.graph.leaders(arm.group)  # type: ignore[arg-type]
    macs = [branch.macs for branch in case.lazy.branches]
    for reuse in REUSE:
        row = mask_of(reuse, leaders)
        table = np.vstack([np.ones((1, len(row)), dtype=bool), np.tile(row, (WARM + repeats - 1, 1))])
        steps = arm.gated(CacheSchedule(table))
        times: dict[str, list[float]] = {"dense": [], "gated": []}
        for step in range(WARM + repeats):
            pair = {"dense": _milliseconds(arm.dense), "gated": _milliseconds(partial(next, steps))}
            if step >= WARM:
                for which, value in pair.items():
                    times[which].append(value)
        dense, gated = (statistics.median(times[which]) for which in ("dense", "gated"))
        ideal = 1 - sum(np.array(macs)[~row]) / case.lazy.graph.total_macs
        yield Row(
            name, arm.runtime, arm.gating, str(arm.group), len(set(leaders)), reuse, dense, gated, gated / dense,
            float(ideal),
        )  # fmt: skip


def verdict(rows: Sequence[Row]) -> Verdict:
    """From the rows of one arm."""
    full, none = rows[-1], rows[0]
    promised = none.ideal - full.ideal
    saved = (none.gated_ms - full.gated_ms) / none.gated_ms
    cost = 1000 * (none.gated_ms - none.dense_ms) / none.gates
    return Verdict(none.model, none.runtime, none.gating, none.group, cost, saved / promised)


def _milliseconds(action: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    action()
    wait()
    return 1000 * (time.perf_counter() - start)


def run(
    output: Path, *, small: bool, repeats: int, groups: Sequence[int | str], runtimes: Sequence[str]
) -> dict[str, Any]:
    """Measure everything that there is, and write ``gpu_measure.json`` after every arm."""
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.float16 if on_gpu else torch.float32
    result: dict[str, Any] = {"machine": machine(), "small": small, "rows": [], "verdicts": [], "left_out": []}
    for name, build in (SMALL if small else FULL).items():
        model, inputs = make(build, torch.bfloat16 if on_gpu and "Flux" in name else dtype, device)
        with tempfile.TemporaryDirectory() as folder:
            case = Case(model, lazy_compile.transform(model, inputs, reuse="last"), inputs, Path(folder))
            for arm in arms(case, runtimes, groups, small):
                if isinstance(arm, str):
                    result["left_out"].append(f"{name}: {arm}")
                    print(f"left out: {name}: {arm}", flush=True)
                    continue
                try:
                    rows = list(measure(case, name, arm, repeats))
                except (lazy_compile.errors.LazyCompileError, RuntimeError, AttributeError) as error:
                    result["left_out"].append(f"{name}: {arm.runtime}, {arm.gating}, {arm.group}: {error}")
                    continue
                judged = verdict(rows)
                result["rows"] += [asdict(row) for row in rows]
                result["verdicts"].append(asdict(judged))
                print(line(rows, judged), flush=True)
                save_json(output / "gpu_measure.json", result)
                del arm
                gc.collect()
    return result


def line(rows: Sequence[Row], judged: Verdict) -> str:
    first = rows[0]
    ratios = " ".join(f"{row.ratio:5.2f} ({row.ideal:.2f})" for row in rows)
    return (
        f"{first.model:24.24} {first.runtime:32.32} {first.gating:10} group {first.group:5} {first.dense_ms:8.2f} ms | "
        f"{ratios} | {judged.gate_us:7.1f} us a gate, skipped {judged.skipped:.2f}"
    )


def machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    if torch.cuda.is_available():
        versions |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return versions


def available() -> list[str]:
    """The engines that can be built and run here; without a GPU ONNX Runtime stands in for them."""
    if not torch.cuda.is_available():
        return ["onnxruntime"]
    modules = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
    return [flavor for flavor, module in modules.items() if importlib.util.find_spec(module)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/gpu_measure"), help="folder for gpu_measure.json")
    parser.add_argument("--small", action="store_true", help="tiny models: to see that everything runs")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each kind")
    parser.add_argument("--groups", default="1,2,4,block", help="branches under one gate")
    parser.add_argument("--runtimes", default="", help="tensorrt, rtx, onnxruntime; default is all that is here")
    given = parser.parse_args()
    groups = [int(group) if group.isdecimal() else group for group in given.groups.split(",")]
    runtimes = given.runtimes.split(",") if given.runtimes else available()
    print("dense time | gated over dense (by MACs) at 0, 25, 50, 75 and 100 % reuse | what a gate costs", flush=True)
    run(given.output, small=given.small, repeats=given.repeats, groups=groups, runtimes=runtimes)
    print(f"written to {given.output / 'gpu_measure.json'}")


if __name__ == "__main__":
    main()
