"""Published models at full size without their weights: what is found in them, what it costs, how long it takes."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lazy_compile import pass_pipelines
from lazy_compile.bench.full_size_models import FULL_SIZE
from lazy_compile.bench.full_size_plans import SETTINGS, PlanRow, measure_plan, plan_lines
from lazy_compile.bench.rows import RowFile
from lazy_compile.compiler import transform
from lazy_compile.ir.operators import macs
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.granularity import granularity_rows
from lazy_compile.runtime.lazy_graph import LazyGraph
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import atomic_path


@dataclass(frozen=True)
class FullSizeRow:
    """One model on the meta device, in bfloat16 at batch 1.

    Attributes:
        setting: resolution and length.
        nodes: of the captured graph.
        branches: how many of each kind.
        macs: multiply-accumulates of one call, by the graph.
        counted_macs: half of what ``torch.utils.flop_counter`` counts on the original.
        share_in_branches: of ``macs``.
        step_invariant_share: of ``macs``, what inputs other than the latents and the time decide.
        cache_last: bytes that one sample's caches take with ``reuse="last"``.
        cache_linear: the same with ``reuse="linear"``.
        transform_seconds: capture and all passes, by the clock.
        transform_cpu_seconds: the same, of one processor: what a machine that does nothing else would take.
        pass_seconds: of one processor, each pass by itself on the captured graph.
        resident_bytes: the most that the process held, torch and diffusers included.
        table: for each branch its name, kind, multiply-accumulates, and bytes of one kept output.
        granularities: for each granularity its name, decisions, bytes of one kept value, and the share of ``macs`` that
            is always on.
    """

    model: str
    setting: str
    parameters: int
    nodes: int
    capture: str
    branches: dict[str, int]
    macs: int
    counted_macs: int
    share_in_branches: float
    step_invariant_share: float
    cache_last: int
    cache_linear: int
    transform_seconds: float
    transform_cpu_seconds: float
    pass_seconds: dict[str, float]
    resident_bytes: int
    table: tuple[tuple[str, str, int, int], ...]
    granularities: tuple[tuple[str, int, int, float], ...] = ()


def run(
    output: str | Path | None = None,
    *,
    models: Sequence[str] = tuple(FULL_SIZE),
    plans: bool = True,
    on_progress: OnProgress = no_progress,
) -> tuple[list[FullSizeRow], list[PlanRow]]:
    """Transform each of ``models`` in a process of its own, and simulate the plans that are set for them.

    Args:
        output: a folder for ``full_size.json`` and ``.md``; rows that are there already are not measured again.
        models: by name.
        plans: whether plans are simulated, which takes longest.
    """
    path = None if output is None else Path(output) / "full_size.json"
    rows = RowFile(path, FullSizeRow, ("model",), {})
    planned = RowFile(path, PlanRow, ("model", "granularity", "steps"), {}, name="plans")
    for position, name in enumerate(models):
        rows.get(partial(_measure_apart, name), model=name)
        on_progress("transforming models", position + 1, len(models), name)
    for setting in (each for each in SETTINGS if plans and each.model in models):
        key = {"model": setting.model, "granularity": str(setting.granularity), "steps": setting.steps}
        planned.get(partial(measure_plan, setting, on_progress), **key)
    if output is not None:
        with atomic_path(Path(output) / "full_size.md") as temporary:
            temporary.write_text(page(rows.rows, planned.rows))
    return rows.rows, planned.rows


def _measure_apart(name: str) -> FullSizeRow:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, name).result()


def measure(name: str, **changes: Any) -> FullSizeRow:
    """Transform one model here and now, with these changes to its configuration."""
    model, inputs = FULL_SIZE[name].build(**changes)
    clock, processor = time.perf_counter(), time.process_time()
    lazy = transform(model, inputs)
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - processor
    kept = sum(branch.output_bytes for branch in lazy.branches)
    in_branches = sum(branch.macs for branch in lazy.branches)
    return FullSizeRow(
        model=name,
        setting=FULL_SIZE[name].setting,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        nodes=len(lazy.graph.captured.program.graph.nodes),
        capture=lazy.graph.captured.strategy,
        branches=dict(Counter(branch.kind.value for branch in lazy.branches)),
        macs=lazy.graph.total_macs,
        counted_macs=count_macs(model, inputs),
        share_in_branches=in_branches / lazy.graph.total_macs,
        step_invariant_share=step_invariant_macs(lazy.graph) / lazy.graph.total_macs,
        cache_last=kept,
        cache_linear=2 * kept,
        transform_seconds=seconds,
        transform_cpu_seconds=cpu_seconds,
        pass_seconds=time_passes(lazy),
        resident_bytes=_peak_memory(),
        granularities=tuple(
            (str(each.granularity), each.decisions, each.output_bytes, each.always_on)
            for each in granularity_rows(lazy.graph)
        ),
        table=tuple((branch.name, branch.kind.value, branch.macs, branch.output_bytes) for branch in lazy.branches),
    )


def count_macs(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Multiply-accumulates of one call of a model, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops()) // 2


def step_invariant_macs(graph: LazyGraph) -> int:
    """Multiply-accumulates that stay the same if all inputs but the first, the latents, and the time do."""
    _latents, *others = graph.layout.names
    invariants = frozenset(others) - {graph.timestep_input}
    prologue = pass_pipelines.hoisting(invariants).run(graph.captured.program).prologue
    return sum(map(macs, prologue.graph.nodes)) if prologue else 0


def time_passes(lazy: LazyModule) -> dict[str, float]:
    """Seconds that each pass takes on the graph that was captured last."""
    program, seconds = lazy.graph.captured.program, {}
    for item in pass_pipelines.gating(lazy.lazy_config).passes:
        start = time.process_time()
        program = item(program).program
        seconds[item.name] = time.process_time() - start
    return seconds


def page(rows: Iterable[FullSizeRow], plans: Sequence[PlanRow] = ()) -> str:
    """The figures as Markdown."""
    lines = [
        "# Full-size models without their weights",
        "",
        "Generated by `lazy-compile bench full-size`: published configurations on the meta device, bfloat16, batch 1.",
        "MACs are those of one call; *counted* is how far they are from what `torch.utils.flop_counter` counts on the",
        "original model, halved. *same* is the share that depends neither on the latents nor on the time, made once a",
        "trajectory (`hoist_step_invariants`). *last* and *linear* are the bytes of one sample's caches.",
        "Seconds are those of one processor; resident memory is the peak of the process, torch and diffusers included.",
        "",
        "| model | at | parameters | MACs | counted | in branches | same | last | linear | transform | resident |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = list(rows)
    for row in rows:
        lines.append(
            f"| {row.model} | {row.setting} | {row.parameters / 1e9:.2f} G | {row.macs / 1e12:.2f} T | "
            f"{row.macs / row.counted_macs - 1:+.2%} | {row.share_in_branches:.1%} | "
            f"{row.step_invariant_share:.1%} | {_size(row.cache_last)} | "
            f"{_size(row.cache_linear)} | {row.transform_cpu_seconds:.0f} s | {_size(row.resident_bytes)} |"
        )
    lines += ["", "What is found, and the time of each pass by itself:", ""]
    passes = list(rows[0].pass_seconds)
    lines += [f"| model | captured by | nodes | branches | {' | '.join(passes)} |", "|---" * (4 + len(passes)) + "|"]
    for row in rows:
        kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in row.branches.items())
        times = " | ".join(f"{row.pass_seconds[name]:.2f} s" for name in passes)
        lines.append(f"| {row.model} | {row.capture} | {row.nodes} | {kinds} | {times} |")
    if any(row.granularities for row in rows):
        lines += _granularity_lines(rows)
    if plans:
        lines += ["", *plan_lines(plans)]
    return "\n".join([*lines, ""])


def _granularity_lines(rows: Sequence[FullSizeRow]) -> list[str]:
    lines = [
        "",
        "What is decided and cached as one (`granularity=`): bytes of the caches of one sample (*last*), and",
        "in brackets the share of MACs that runs at every step.",
        "",
        "| model | branch | block | 8 | 4 | 2 | model |",
        "|---" * 7 + "|",
    ]
    for row in (row for row in rows if row.granularities):
        cells = {name: f"{_size(kept)} ({always:.2%})" for name, _, kept, always in row.granularities}
        shown = " | ".join(cells.get(name, "the same") for name in ("branch", "block", "8", "4", "2", "model"))
        lines.append(f"| {row.model} | {shown} |")
    return lines


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _peak_memory() -> int:
    """Bytes; the unit of the operating system's own number is kilobytes everywhere but on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
