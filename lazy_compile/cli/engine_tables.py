"""What the command line shows of engines: before they are built, and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lazy_compile.reporting.terminal_tables import add_row, facts, new_table, plain, size

if TYPE_CHECKING:
    from lazy_compile.backends.tensorrt.build import BuildReport
    from lazy_compile.backends.tensorrt.dry_run import BuildPreview


def preview_values(preview: BuildPreview, source: str, output: object) -> dict[str, Any]:
    """For ``--json``."""
    tensors = [{**plain(tensor), "role": role} for tensor, role in zip(preview.tensors, preview.roles, strict=True)]
    return {**plain(preview), "onnx": source, "output": str(output), "tensors": tensors}


def preview_tables(preview: BuildPreview) -> list[Table | str]:
    table = new_table("", "tensor", "role", "type", "shape")
    listed = zip(preview.tensors, preview.roles, strict=True)
    for tensor, role in ((tensor, role) for tensor, role in listed if role != "cache"):
        direction = "in" if tensor.is_input else "out"
        add_row(table, direction, tensor.name, role, tensor.dtype, _shape(tensor.shape))
    values: dict[str, Any] = {
        "engines": preview.engines,
        "decided by": _DECIDES.get(preview.gating, "nothing is known: export did not write this file"),
        "branches": preview.branches,
        "jumps": preview.conditionals,
        "weights": size(preview.weight_bytes),
        "caches of one stream": f"{size(preview.cache_bytes)} in {preview.roles.count('cache') // 2} slots, twice each",
    }
    for each in preview.memory:
        title = f"at {each.which} shapes" + (f" of profile {each.profile}" if each.profile else "")
        values[title] = f"{size(each.cache_bytes)} ({', '.join(f'{key}={value}' for key, value in each.sizes.items())})"
    if preview.invariant_bytes:
        values["computed once a trajectory"] = size(preview.invariant_bytes)
    lines: list[Table | str] = [table, facts(values)]
    if preview.speedups:
        bounds = ", ".join(f"{speedup:.2f} at {reuse:.0%}" for reuse, speedup in preview.speedups.items())
        lines.append(f"speed-up by the MACs that reuse saves, at most: {bounds} reuse; what jumps cost is not in it")
    return [*lines, "nothing was written"]


_DECIDES = {
    "predicate": "gates in the graph",
    "input": "the host, by boolean inputs",
    "schedule": "the schedule, fixed in each engine",
}


def build_table(reports: Sequence[BuildReport]) -> Table:
    """One line an engine."""
    table = new_table(
        "engine", ">size", ">jumps", ">heavy inside", ">heavy always", ">fused attention", ">host copies", ""
    )
    for report in reports:
        found = report.structure.summary()
        note = "was there already" if report.skipped else f"{report.seconds:.1f} s"
        add_row(
            table, report.path.name, size(report.bytes), *(str(found[name]) for name in _COUNTS),
            "; ".join([note, *report.structure.problems]),
        )  # fmt: skip
    return table


def sizes_lines(reports: Sequence[BuildReport]) -> list[str]:
    """For which sizes a file with free ones was built."""
    sizes = {report.sizes for report in reports if report.sizes}
    return [f"built for {each}; --minShapes and --maxShapes give other ranges" for each in sorted(sizes)]


_COUNTS = ("branches", "heavy_inside", "heavy_always", "fused_attention", "host_copies")


def _shape(shape: Sequence[int]) -> str:
    return "x".join("?" if length < 0 else str(length) for length in shape) or "scalar"
