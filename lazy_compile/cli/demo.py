"""``lazy-compile demo``: the whole story on scanned digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import OutputOptions


@dataclass(frozen=True, kw_only=True)
class DemoOptions(OutputOptions):
    """What ``lazy-compile demo`` takes."""

    output: given.Folder = Path("build/demo")


def demo(options: DemoOptions) -> None:
    """The whole story on scanned digits: inspect, calibrate, compare with fewer steps, export, run; pictures of emoji.

    Takes minutes.
    """
    from lazy_compile.demo.run import run_demo
    from lazy_compile.reporting.terminal_tables import facts, result_table, show

    summary = run_demo(options.output, progress=not options.json)
    written = {"report": options.output / "report.html", "summary": options.output / "summary.json"}
    show(summary, options.json, result_table(summary), facts(written))
