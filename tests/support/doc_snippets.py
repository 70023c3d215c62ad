"""Python blocks of Markdown pages, as a reader would run them: in order, in one namespace.

A page says in HTML comments what its blocks need, ``<!-- setup: tiny_pipeline -->``, and which of them cannot run here,
``<!-- not run: needs a GPU -->`` right before the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REASONS = ("needs a GPU", "needs OpenVINO")
"""Why a block may be left out."""

_PIECE = re.compile(
    r"^<!-- setup: (?P<setup>\w+) -->$"
    r"|^(?:<!-- not run: (?P<reason>[^\n]*) -->\n+)?```python\n(?P<source>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Setup:
    """The name of a function that prepares what the blocks after it use."""

    name: str


@dataclass(frozen=True)
class Snippet:
    """One block.

    Attributes:
        line: of the page on which its code starts.
        reason: why it is not run; empty if it is.
    """

    source: str
    line: int
    reason: str = ""


def pieces_of(text: str) -> list[Setup | Snippet]:
    """Set-ups and blocks in the order of the page."""
    found: list[Setup | Snippet] = []
    for match in _PIECE.finditer(text):
        if match["setup"]:
            found.append(Setup(match["setup"]))
        else:
            line = text.count("\n", 0, match.start("source")) + 1
            found.append(Snippet(match["source"], line, match["reason"] or ""))
    return found


def run_page(page: Path, setups: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Run every block of a page that can run here; a failure names the page and its line.

    Returns:
        The namespace that the blocks leave behind.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    for piece in pieces_of(page.read_text(encoding="utf-8")):
        if isinstance(piece, Setup):
            namespace.update(setups[piece.name]())
        elif not piece.reason:
            code = compile("\n" * (piece.line - 1) + piece.source, str(page), "exec", dont_inherit=True)
            exec(code, namespace)
    return namespace
