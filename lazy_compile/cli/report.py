"""``lazy-compile report``: a page about gates or a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lazy_compile.cli.shared_options import OutputOptions


@dataclass(frozen=True, kw_only=True)
class ReportOptions(OutputOptions):
    """What ``lazy-compile report`` takes."""

    source: Annotated[Path, typer.Argument(help="A summary.json, or a folder that calibrate or plan wrote.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html")


def report(options: ReportOptions) -> None:
    """Write a self-contained HTML page about a comparison, or about calibrated gates."""
    from lazy_compile.reporting.html_report import write_report
    from lazy_compile.reporting.terminal_tables import facts, show

    values = {"source": str(options.source), "output": str(write_report(options.source, options.output))}
    show(values, options.json, facts(values))
