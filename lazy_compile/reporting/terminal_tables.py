"""What the command line shows: each answer as plain data for ``--json``, and the same data as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lazy_compile.runtime.granularity import cache_bytes, granularity_rows

if TYPE_CHECKING:
    from lazy_compile.runtime.module import LazyModule
    from lazy_compile.verification import Comparison

WIDTH_WITHOUT_TERMINAL = 140


def show(values: Mapping[str, Any], as_json: bool, *rendered: RenderableType) -> None:
    """On standard output: the data and nothing else, or the text made of it."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)
    for item in rendered:
        console.print(item, markup=False, soft_wrap=isinstance(item, str))


def plain(report: Any) -> dict[str, Any]:
    """The fields of a report, as JSON has them."""
    return {item.name: _plain(getattr(report, item.name)) for item in fields(report)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def inspection(name: str, lazy: LazyModule) -> dict[str, Any]:
    graph = lazy.graph
    in_branches = sum(branch.macs for branch in lazy.branches)
    return {
        "model": name,
        "capture": graph.captured.strategy,
        "attempts": list(graph.captured.attempts),
        "guarded_inputs": list(graph.guarded_inputs),
        "timestep_input": graph.timestep_input,
        "total_macs": graph.total_macs,
        "share_in_branches": in_branches / graph.total_macs,
        "cache_bytes": lazy.expected_cache_bytes,
        "branches": [
            {
                "index": branch.index,
                "name": branch.name,
                "kind": branch.kind.value,
                "path": branch.path,
                "macs": branch.macs,
                "share": branch.macs / graph.total_macs,
                "entries": [list(entry.shape) for entry in branch.entries],
                "gate_features": branch.gate_features,
                "cache_bytes": cache_bytes([branch], lazy.lazy_config),
                "decides": "per row" if branch.row_separable else "per call",
                "why_per_call": branch.why_not_separable,
            }
            for branch in lazy.branches
        ],
        "granularities": [
            {
                "granularity": row.granularity,
                "decisions": row.decisions,
                "cache_bytes": lazy.lazy_config.values_kept * row.output_bytes,
                "always_on": row.always_on,
                "note": row.note,
            }
            for row in granularity_rows(graph)
        ],
        "refusals": [
            {"node": refusal.node, "path": refusal.path, "reason": refusal.reason} for refusal in lazy.refusals
        ],
    }


def branch_table(values: Mapping[str, Any]) -> Table:
    table = new_table(">#", "branch", "kind", "module path", ">MACs", ">share", "entries", ">cache", "decides")
    for branch in values["branches"]:
        entries = " ".join("x".join(map(str, shape)) for shape in branch["entries"])
        add_row(
            table, str(branch["index"]), branch["name"], branch["kind"], branch["path"], count(branch["macs"]),
            f"{branch['share']:.1%}", entries, size(branch["cache_bytes"]), branch["decides"],
        )  # fmt: skip
    return table


def granularity_table(values: Mapping[str, Any]) -> Table:
    """What could be decided and cached as one, instead of every branch."""
    table = new_table("granularity", ">decisions", ">cache", ">always on", "")
    for row in values["granularities"]:
        cells = (str(row["decisions"]), size(row["cache_bytes"]), f"{row['always_on']:.2%}", row["note"])
        add_row(table, str(row["granularity"]), *cells)
    return table


def inspection_summary(values: Mapping[str, Any]) -> str:
    lines = [
        f"{len(values['branches'])} branches hold {values['share_in_branches']:.1%} of {count(values['total_macs'])} "
        f"MACs; their caches take {size(values['cache_bytes'])} per stream at the captured sizes",
        f"captured by {values['capture']}; time input: {values['timestep_input'] or 'none found'}; "
        f"{len(values['refusals'])} candidates refused",
    ]
    if values["guarded_inputs"]:
        lines.append(f"captured again when the model reads other values from {', '.join(values['guarded_inputs'])}")
    return "\n".join([*lines, *(f"tried before: {attempt}" for attempt in values["attempts"])])


def refusal_table(values: Mapping[str, Any]) -> Table:
    table = new_table("node", "module path", "why not")
    for refusal in values["refusals"]:
        add_row(table, refusal["node"], refusal["path"], refusal["reason"])
    return table


def check_table(comparison: Comparison) -> Table:
    table = new_table("check", "", "seen", "expected")
    for check in comparison.checks:
        verdict = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
        add_row(table, check.name, verdict, check.seen, check.expected)
    return table


def facts(values: Mapping[str, Any]) -> Table:
    """Name and value, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = ", ".join(map(str, value)) or "none"
        add_row(table, name.replace("_", " "), "none" if value is None else text)
    return table


def result_table(summary: Mapping[str, Any]) -> Table:
    """The rows of a ``summary.json``."""
    table = new_table("method", ">steps", ">reused", ">compute", ">rmse to dense", ">rmse to reference", ">Fréchet")
    for row in summary["rows"]:
        add_row(
            table, row.get("label", row["method"]), str(row["sampler_steps"]), f"{row['lazy_ratio']:.1%}",
            f"{row['compute_ratio']:.1%}", *(_spread(row, key) for key in ("rmse_dense", "rmse_reference", "frechet")),
            style="bold" if row["method"] == "lazy" else None,
        )  # fmt: skip
    return table


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("runtime", "arm", ">reuse", ">time over dense", ">quartiles", ">ideal", ">efficiency")
    for row in rows:
        low, high = row["quartiles"]
        add_row(
            table, row["runtime"], row["reuse_arm"], f"{row['reuse']:.0%}", f"{row['time_ratio']:.3f}",
            f"{low:.3f} - {high:.3f}", f"{row['ideal_ratio']:.3f}", f"{row['efficiency']:.3f}",
        )  # fmt: skip
    return table


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "model", ">parameters", ">branches", ">original", ">lazy", ">lazy over original", ">quartiles", "equal",
        ">us a branch: computing", ">reusing",
    )  # fmt: skip
    for row in rows:
        low, high = row["quartiles"]
        add_row(
            table, row["model"], count(row["parameters"]), str(row["branches"]), f"{row['original_ms']:.0f} ms",
            f"{row['lazy_ms']:.0f} ms", f"{row['ratio']:.3f}", f"{low:.3f} - {high:.3f}",
            "bitwise" if row["bitwise_equal"] else "no",
            f"{row['computing_us']:.1f}", f"{row['reusing_us']:.1f}",
        )  # fmt: skip
    return table


def compile_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "model", "granularity", ">reuse", ">dense eager", ">dense compiled", ">lazy eager", ">lazy compiled",
        ">compiled ratio", ">quartiles", ">ideal", ">efficiency", ">graphs", ">compile time", ">calls a step", ">error",
    )  # fmt: skip
    for row in rows:
        low, high = row["quartiles"]
        times = ("dense_eager_ms", "dense_compiled_ms", "lazy_eager_ms", "lazy_compiled_ms")
        add_row(
            table, row["model"], str(row["granularity"]), f"{row['reuse']:.0%}",
            *(f"{row[name]:.1f} ms" for name in times),
            f"{row['compiled_ratio']:.3f}", f"{low:.3f} - {high:.3f}", f"{row['ideal_ratio']:.3f}",
            f"{row['efficiency']:.3f}", f"{row['dense_graphs']} / {row['lazy_graphs']}",
            f"{row['dense_compile_s']:.0f} / {row['lazy_compile_s']:.0f} s", f"{row['compiled_calls']:.0f}",
            f"{row['error']:.0e}",
        )  # fmt: skip
    return table


def identity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "model", "scheduler", ">steps", ">calls", ">proven", ">exact", ">own, farthest", ">others", ">mistaken",
        ">confused", ">others, nearest",
    )  # fmt: skip
    for row in rows:
        add_row(
            table, row["model"], row["scheduler"], str(row["steps"]), str(row["calls"]), f"{row['continued']:.1%}",
            f"{row['exact']:.0%}", f"{row['farthest']:.1e}", str(row["impostors"]), str(row["mistaken"]),
            str(row["confused"]), f"{row['nearest']:.2f}",
        )  # fmt: skip
    return table


def pictures_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "method", ">steps", ">MACs", ">RMSE to dense", ">PSNR", ">SSIM", ">perceptual", ">own caption first"
    )
    for row in rows:
        add_row(
            table, row["method"], str(row["steps"]), f"{row['compute_ratio']:.1%}", f"{row['rmse_dense']:.4f}",
            f"{row['psnr']:.1f}", f"{row['ssim']:.4f}", f"{row['perceptual']:.4f}", f"{row['accuracy']:.1%}",
        )  # fmt: skip
    return table


def full_size_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "model", "at", ">parameters", ">MACs", ">in branches", ">cache, linear", ">transform", ">resident"
    )
    for row in rows:
        add_row(
            table, row["model"], row["setting"], count(row["parameters"]), count(row["macs"]),
            f"{row['share_in_branches']:.1%}", size(row["cache_linear"]), f"{row['transform_seconds']:.0f} s",
            size(row["resident_bytes"]),
        )  # fmt: skip
    return table


def plans_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("plan of", ">steps", "granularity", ">weights", ">device", ">said", ">host", ">disk", ">calls")
    for row in rows:
        taken = [f"{row[name] / 1e9:.1f} GB" for name in PLANS]
        add_row(table, row["model"], str(row["steps"]), row["granularity"], *taken, str(row["model_calls"]))
    return table


PLANS = ("weight_bytes", "device_bytes", "estimated_device_bytes", "host_bytes", "disk_bytes")


def count(number: float) -> str:
    """``1.5 M``: with an SI prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """``2.5 MiB``."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"


def _spread(row: Mapping[str, Any], key: str) -> str:
    deviation = row.get(f"{key}_std")
    return f"{row[key]:.4f}" if deviation is None else f"{row[key]:.4f} ±{deviation:.4f}"


def new_table(*columns: str) -> Table:
    """A column of numbers starts with ``>``."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left")
    return table


def add_row(table: Table, *cells: str | Text, style: str | None = None) -> None:
    """Cells are taken as they are: a shape or a path may look like markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells), style=style)


def reuse_picture(names: Sequence[str], shares: Sequence[Sequence[float]]) -> Text:
    """``shares[step][branch]``, one line a branch: full blocks reuse, dots compute."""
    shades = "·░▒▓█"
    lines = [
        "".join(shades[round(share * (len(shades) - 1))] for share in branch) + f"  {name}"
        for name, branch in zip(names, zip(*shares, strict=True), strict=True)
    ]
    return Text("\n".join(lines))
