"""Progress of long work, as a callable that library code reports to and the command line draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

OnProgress = Callable[..., None]
"""``(stage, done, total, note="")``: called whenever ``done`` of ``total`` units of ``stage`` are finished."""


LOG_INTERVAL = 15.0
"""Seconds between progress lines where standard error is not a terminal."""


def no_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """Report to nobody."""


@contextmanager
def progress_bars(enabled: bool = True) -> Iterator[OnProgress]:
    """One bar per stage on standard error; where that is not a terminal, a line every :data:`LOG_INTERVAL` seconds."""
    if not enabled:
        yield no_progress
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield report


def _lines() -> OnProgress:
    last = time.monotonic()

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_INTERVAL:
            last = time.monotonic()
            print(f"{stage}: {done} of {total}" + (f", {note}" if note else ""), file=sys.stderr, flush=True)

    return report


@contextmanager
def working(text: str) -> Iterator[None]:
    """A line on standard error that says what takes long, and since when; where that is not a terminal, the text."""
    console = Console(file=sys.stderr)  # this one: others may redirect it in the meantime
    if not console.is_terminal:
        print(text, file=sys.stderr, flush=True)
        yield
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=console
    ) as line:
        line.add_task(text, total=None)
        yield
