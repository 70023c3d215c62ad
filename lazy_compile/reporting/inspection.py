"""What a lazy model consists of, as plain data."""

from __future__ import annotations

from typing import Any

from lazy_compile.reporting.terminal_tables import inspection
from lazy_compile.runtime.module import LazyModule


def inspect(lazy: LazyModule) -> dict[str, Any]:
    """The branches of a captured model, their MACs and caches (bytes), and the refusals: what ``--json`` prints."""
    return inspection(type(lazy.original).__name__, lazy)
