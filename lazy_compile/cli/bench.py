"""The verbs that measure what a transformation costs: bench overhead, bench full-size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lazy_compile.cli import options as given


def overhead(
    output: given.Folder = Path("build/bench"),
    model: Annotated[list[str] | None, typer.Option(help="DiT, SD3, FLUX, Wan or CogView4; by default all.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed calls of each model.")] = 15,
    json: given.Json = False,
) -> None:
    """Time transformed models that reuse nothing against their originals, side by side, and write overhead.json."""
    from lazy_compile.bench.midsize import MIDSIZE
    from lazy_compile.bench.overhead import run as measure
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import overhead_table, plain, show

    with progress_bars(not json) as on_progress:
        measured = measure(output, models=model or tuple(MIDSIZE), repeats=repeats, on_progress=on_progress)
    rows = [plain(row) for row in measured]
    show({"rows": rows, "output": str(output)}, json, overhead_table(rows), f"written to {output}")


def full_size(
    output: given.Folder = Path("build/bench"),
    model: Annotated[list[str] | None, typer.Option(help="FLUX.1-dev, say; by default all.")] = None,
    json: given.Json = False,
) -> None:
    """Transform published models at full size without their weights; write full_size.json and .md. Takes minutes."""
    from lazy_compile.bench.full_size import run as measure
    from lazy_compile.bench.full_size_models import FULL_SIZE
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.tables import full_size_table, plain, show

    with progress_bars(not json) as on_progress:
        rows = [plain(row) for row in measure(output, models=model or tuple(FULL_SIZE), on_progress=on_progress)]
    show({"rows": rows, "output": str(output)}, json, full_size_table(rows), f"written to {output}")
