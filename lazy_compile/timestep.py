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

from torch import Tensor, fx

from lazy_compile.errors import ConfigError
from lazy_compile.operators import operator_name, value_of
from lazy_compile.program import Program, Role
from lazy_compile.runtime import CacheState

logger = logging.getLogger("lazy_compile")

MAX_STREAMS = 8
"""Calls in a row with one timestep that count as parallel streams (conditional, unconditional, ...) of a trajectory."""

_TIME_WORDS = frozenset(
    [
        *["timestep", "timesteps", "time", "t", "t_hat", "tau", "sigma", "sigmas", "log_snr", "logsnr"],
        *["noise_level", "noise_levels", "noise_labels", "noise_cond", "c_noise"],
    ]
)


def find_timestep_input(program: Program, wanted: str | None) -> int | None:
    """Position of the time input among the user's tensors; None if the model has none.

    It is the scalar, or tensor of one value per row, that a sinusoidal embedding reads. Where several are embedded so
    (FLUX embeds its guidance too), the argument's name decides, then the order. One value for each frame or token is
    the time only if a sinusoid reads it and its name says so: positions look the same.

    Raises:
        ConfigError: ``wanted`` names no tensor input.
    """
    users = [
        (node, item.name)
        for node, item in zip(program.placeholders, program.inputs, strict=True)
        if item.role is Role.USER
    ]
    names = [name for _, name in users]
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"timestep_input is {wanted!r}; the tensor inputs of this model are {', '.join(names)}")
        return names.index(wanted)
    small = [position for position, (node, _) in enumerate(users) if _is_small(node)]
    embedded = [position for position in small if _reaches_sinusoid(users[position][0])]
    candidates = embedded or [position for position in small if names_the_time(names[position])]
    candidates = candidates or [position for position, user in enumerate(users) if _is_time_of_parts(*user)]
    named = [position for position in candidates if names_the_time(names[position])]
    return next(iter(named or candidates), None)


def names_the_time(path: str, wanted: str | None = None) -> bool:
    """Whether an argument is called like a timestep, or as the caller has said that it is called."""
    return path == wanted or (wanted is None and path.rpartition(".")[2] in _TIME_WORDS)


def _is_small(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and all(isinstance(size, int) and size == 1 for size in value.shape[1:])


def _is_time_of_parts(node: fx.Node, name: str) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 2 and names_the_time(name) and _reaches_sinusoid(node)


def _reaches_sinusoid(source: fx.Node) -> bool:
    frontier, seen = [source], {source}
    while frontier:
        for user in frontier.pop().users:
            value = value_of(user)
            if user in seen or not isinstance(value, Tensor) or value.dim() > 5:
                continue
            if operator_name(user) in ("sin", "cos"):
                return True
            if operator_name(user) in _ELEMENTWISE:
                seen.add(user)
                frontier.append(user)
    return False


_ELEMENTWISE = frozenset(
    {
        "_to_copy", "to", "expand", "view", "reshape", "unsqueeze", "squeeze", "slice", "select", "flatten", "repeat",
        "mul", "div", "add", "sub", "rsub", "neg", "einsum", "outer", "cat", "clone", "contiguous", "matmul", "type_as",
        "log", "log2", "log10", "log1p", "exp", "sqrt", "rsqrt", "pow", "reciprocal", "clamp", "clamp_min", "atan",
    }
)  # fmt: skip


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

    streams: list[CacheState] = field(default_factory=list)
    timestep: float | None = None
    step: int = -1
    turn: int = 0
    direction: int = -1
    against: int = 0
    only_call: float | None = None
    before: float | None = None

    def advance(self, timestep: float | None) -> tuple[CacheState, int, bool]:
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
            self.streams.append(CacheState())
        state = self.streams[self.turn]
        state.timestep_before = self.before
        return state, self.step, started

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
        for state in self.streams:
            for slot in state.slots.values():
                slot.computed_at = slot.computed_at + 1

    def reset(self) -> None:
        """Forget the caches; the next call starts a trajectory."""
        self.streams.clear()
        self.timestep, self.step, self.turn = None, -1, 0
        self.only_call = None

    @property
    def bytes(self) -> int:
        return sum(state.bytes for state in self.streams)


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

    def advance(self, timestep: float | None) -> tuple[CacheState, int, bool]:
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
