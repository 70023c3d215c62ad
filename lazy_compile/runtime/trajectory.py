"""Finding the model's time input, and following a trajectory by its values alone."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.step_invariants import StepInvariants

logger = logging.getLogger("lazy_compile")

MAX_STREAMS = 8
"""Calls in a row with one timestep that count as parallel streams (conditional, unconditional, ...) of a trajectory."""


@dataclass
class Stream:
    """What one stream of a trajectory keeps: the conditional or the unconditional, say.

    Attributes:
        caches: what its branches produced.
        invariants: what need not be computed again, see :mod:`lazy_compile.runtime.step_invariants`.
    """

    caches: CacheState = field(default_factory=CacheState)
    invariants: StepInvariants | None = None

    @property
    def bytes(self) -> int:
        return self.caches.bytes + (0 if self.invariants is None else self.invariants.bytes)


@dataclass
class Trajectory:
    """Where a caller stands: which step of which trajectory, and which of its parallel streams.

    The first call starts a trajectory. A call with another timestep is the next step, unless it moves back towards the
    noisier end: then a new trajectory starts. A call with the same timestep is the same step of the next stream, so
    that classifier-free guidance may call twice. Time is taken to fall along a trajectory until two moves in a row show
    that this model's time rises. Two times that alternate from the first call on may be steps of either direction:
    then every call starts a trajectory, since a cache of another sample is worse than none.

    Attributes:
        only_call: the time of the trajectory before this one, if that had a single step.
        before: the time of the step before this one.
    """

    streams: list[Stream] = field(default_factory=list)
    timestep: float | None = None
    step: int = -1
    turn: int = 0
    direction: int = -1
    against: int = 0
    only_call: float | None = None
    before: float | None = None

    def advance(self, timestep: float | None) -> tuple[Stream, int, bool]:
        """The caches and the step index of this call, and whether it starts a trajectory."""
        started = self.timestep is None and self.step < 0
        if timestep is None:
            self.step += 1
        elif started:
            self.step = 0
        elif timestep == self.timestep:
            self.turn += 1
            started = self.turn >= MAX_STREAMS
        else:
            only_call = self.timestep if self.step == 0 else None
            started = self._moves_back(timestep)
            self.only_call = only_call if started else None
            self.step, self.turn = self.step + 1, 0
        if started:
            self.streams.clear()
            self.step = self.turn = 0
        if started or timestep != self.timestep:
            self.before = None if started else self.timestep
        self.timestep = timestep
        if self.turn >= len(self.streams):
            self.streams.append(Stream())
        stream = self.streams[self.turn]
        stream.caches.timestep_before = self.before
        return stream, self.step, started

    def _moves_back(self, timestep: float) -> bool:
        assert self.timestep is not None
        move = 1 if timestep > self.timestep else -1
        if move == self.direction:
            self.against = 0
            return timestep == self.only_call
        self.against += 1
        if self.against >= 2:
            self.direction, self.against = move, 0
            self._undo_restart()
            return False
        return True

    def _undo_restart(self) -> None:
        """The move before this one was a step, not a restart."""
        self.step += 1
        for stream in self.streams:
            for slot in stream.caches.slots.values():
                slot.computed_at = slot.computed_at + 1

    def reset(self) -> None:
        """Forget the caches; the next call starts a trajectory."""
        self.streams.clear()
        self.timestep, self.step, self.turn = None, -1, 0
        self.only_call = None

    @property
    def bytes(self) -> int:
        return sum(stream.bytes for stream in self.streams)


_current_stream: ContextVar[str] = ContextVar("lazy_compile_stream", default="")


@contextmanager
def use_stream(name: str) -> Iterator[None]:
    token = _current_stream.set(name)
    try:
        yield
    finally:
        _current_stream.reset(token)


MAX_NAMED_STREAMS = 32
"""Named streams that one thread keeps; the caches of the least recently used go first."""


class Trajectories:
    """The trajectories of one model: one for each thread and each named stream in it; they end with their thread."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._threads: WeakSet[_Streams] = WeakSet()
        self._mutex = threading.Lock()

    def advance(self, timestep: float | None) -> tuple[Stream, int, bool]:
        """See :meth:`Trajectory.advance`, for the stream in which the caller is."""
        trajectory = self.current()
        with self._mutex:
            return trajectory.advance(timestep)

    def current(self) -> Trajectory:
        name = _current_stream.get()
        with self._mutex:
            streams = self._mine
            trajectory = streams.setdefault(name, Trajectory())
            streams.move_to_end(name)
            while len(streams) > MAX_NAMED_STREAMS + ("" in streams):
                oldest = next(each for each in streams if each)
                del streams[oldest]
                logger.warning(
                    "more than %d named streams in one thread: the caches of %r were dropped; "
                    "reset(stream=...) forgets those that have ended", MAX_NAMED_STREAMS, oldest,
                )  # fmt: skip
        return trajectory

    def reset(self, stream: str | None = None, *, every_thread: bool = False) -> None:
        """Forget the caches of all streams or of one, in this thread or in all of them."""
        with self._mutex:
            for streams in list(self._threads) if every_thread else [self._mine]:
                if stream is not None:
                    streams.pop(stream, None)
                    continue
                for name in [name for name in streams if name]:
                    del streams[name]
                for trajectory in streams.values():
                    trajectory.reset()

    @property
    def bytes(self) -> int:
        """Of all threads."""
        with self._mutex:
            return sum(trajectory.bytes for streams in list(self._threads) for trajectory in streams.values())

    @property
    def _mine(self) -> _Streams:
        if not hasattr(self._local, "streams"):
            self._local.streams = _Streams()
            self._threads.add(self._local.streams)
        result: _Streams = self._local.streams
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Trajectories:
        return Trajectories()

    def __reduce__(self) -> tuple[type[Trajectories], tuple[()]]:
        return Trajectories, ()


class _Streams(OrderedDict[str, Trajectory]):
    """The streams of one thread by name, the one used last at the end."""

    __hash__ = object.__hash__  # type: ignore[assignment]
