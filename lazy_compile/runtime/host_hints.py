"""What a host says about the calls that it makes: the name of their stream, the trajectory that they belong to."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """What a host says about the calls that follow, see :meth:`LazyModule.trajectory`."""

    keys: tuple[Hashable, ...]
    steps: tuple[int | None, ...]


_stream_name: ContextVar[str] = ContextVar("lazy_compile_stream", default="")


known_trajectory: ContextVar[Known | None] = ContextVar("lazy_compile_trajectory", default=None)


@contextmanager
def use_stream(name: str) -> Iterator[None]:
    token = _stream_name.set(name)
    try:
        yield
    finally:
        _stream_name.reset(token)


@contextmanager
def use_trajectory(known: Known) -> Iterator[None]:
    token = known_trajectory.set(known)
    try:
        yield
    finally:
        known_trajectory.reset(token)


def current_stream() -> str:
    return _stream_name.get()
