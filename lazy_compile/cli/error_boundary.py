"""The one place where errors end: a line on standard error, and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from lazy_compile.errors import LazyCompileError

INTERRUPTED = 130
LONGEST_LINE = 300
_DEBUG = f"{__name__}.debug"


def debug_option(ctx: typer.Context, wanted: bool) -> None:
    """Remember ``--debug`` for the boundary."""
    ctx.meta[_DEBUG] = wanted


class OneLineErrors(TyperGroup):
    """Turns every error into one line and its exit code; a traceback goes before it where one is asked for."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TyperException, typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if ctx.meta.get(_DEBUG) or os.environ.get("LAZY_COMPILE_DEBUG", "0") not in ("", "0"):
                traceback.print_exception(error)
            print(f"error: {describe(error)}", file=sys.stderr)
            raise typer.Exit(error.exit_code if isinstance(error, LazyCompileError) else 1) from None


def describe(error: Exception) -> str:
    """One line: what was seen, and what to do next."""
    text = " ".join(str(error).split())
    if isinstance(error, LazyCompileError):
        return text
    next_step = _next_step(error, text)
    seen = f"{type(error).__name__}: {text}" if text else type(error).__name__
    room = LONGEST_LINE - len("error: ") - len("; ") - len(next_step)
    return f"{seen if len(seen) <= room else seen[: room - 3] + '...'}; {next_step}"


def _next_step(error: Exception, text: str) -> str:
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "there is not enough memory: give a smaller batch or smaller sizes by --shape, or another --device"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some of it, or write to another by --output"
    if isinstance(error, OSError) and error.filename is not None:
        return "see that the file is there and may be read or written"
    if isinstance(error, RecursionError):
        return "something is nested too deeply, a JSON file perhaps; --debug shows where"
    if isinstance(error, ValueError) and "integer string conversion" in text:
        return "a file or an option holds a number that is far too long; --debug shows where"
    return "this comes from the model or from a library below; --debug shows where"


def exit_codes() -> dict[int, str]:
    """What each exit code means."""
    kinds = sorted(LazyCompileError.__subclasses__(), key=lambda kind: kind.exit_code)
    meanings = {kind.exit_code: (kind.__doc__ or "").strip().splitlines()[0] for kind in kinds}
    others = "An error of the model or of a library below."
    return {0: "Done.", 1: others, **meanings, INTERRUPTED: "Interrupted."}
