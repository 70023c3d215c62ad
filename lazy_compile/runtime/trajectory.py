"""Which rows of a call continue which rows of earlier calls, proven by what they hold.

A sampler calls a model again and again, and says nothing of whose turn it is. So every row of a call is matched by its
content. Its *latents* tell the trajectory and the step: they are those of a call before (the same step, of another
stream), or follow from them and from what the model returned. Its *conditions*, all that stays from step to step, tell
the stream: the conditional, the unconditional, a window. Time and order never prove anything. What continues nothing
that is known starts a trajectory, and has nothing cached.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.runtime.cache import CacheState, gathered
from lazy_compile.runtime.fingerprint import Floats, Latents, read, samples_of
from lazy_compile.runtime.host_hints import Known, known_trajectory
from lazy_compile.runtime.positions import (
    CERTAIN,
    EXACT,
    RELATED,
    Position,
    Returned,
    Stream,
    Trajectory,
    away,
    differing,
    ends,
    forget_latents,
    is_ambiguous,
    is_at,
    next_position,
    starts_over,
    turns_back,
    unexplained_share,
)
from lazy_compile.runtime.step_invariants import StepInvariants

logger = logging.getLogger("lazy_compile")


IDLE_CALLS = 128
"""A trajectory that was not continued for as many calls, and 8 for each that is alive, is forgotten."""


@dataclass(frozen=True)
class Identity:
    """What a call says about its rows, before it is matched.

    Attributes:
        rows: how many there are; 1 where they cannot be taken apart.
        latents: the sampled latents of each row; None if the model has none, or on the meta device.
        conditions: for each row.
        times: the time input of each row; None if the model has none.
        context: see :class:`Stream`.
    """

    rows: int
    latents: Sequence[Floats] | None
    conditions: Sequence[Mapping[str, Floats]]
    times: Sequence[float] | None
    context: object


@dataclass(eq=False)
class _Row:
    """A row of a call, placed: at a position, and as the continuation of a stream or of none."""

    position: Position
    stream: Stream | None
    conditions: Mapping[str, Floats]
    has_caches: bool


@dataclass(eq=False)
class Placed:
    """A call placed in its trajectories.

    Attributes:
        state: the caches of its rows, as they are before the call.
        steps: ``int64[rows]``, which call of its trajectory each row makes.
        times, before: the time input of each row now and at the step before; None where there is none.
        starts: whether every row starts a trajectory.
    """

    state: CacheState
    steps: npt.NDArray[np.int64]
    times: tuple[float | None, ...]
    before: tuple[float | None, ...]
    starts: bool
    rows: list[_Row]
    call: int
    context: object

    @property
    def step(self) -> int:
        return int(self.steps.max())


class Trajectories:
    """What is known of the calls of one model, whatever threads they come from."""

    def __init__(self) -> None:
        self._alive: list[Trajectory] = []
        self._mutex = threading.Lock()
        self._call = 0
        self._unread: list[Returned] = []
        self._invariants: dict[int, tuple[CacheState, StepInvariants]] = {}
        _ALL.add(self)

    # Placing a call -----------------------------------------------------------------------------------------------

    def identify(
        self,
        named: Mapping[str, tuple[Tensor, int | None]],
        latents: Latents | None,
        latents_name: str,
        time_name: str | None,
        rows: int,
        context: object,
    ) -> Identity:
        """Read what identifies the rows of a call, with what earlier calls returned, by one copy from each device.

        Args:
            named: the tensors of the call by name, with the axis of their rows; None for one that all rows share.
            latents: where the latents are.
            time_name: the name of the time input.
        """
        if any(tensor.is_meta for tensor, _ in named.values()):
            return Identity(rows, None, [{}] * rows, None, context)
        tensors: dict[str, Tensor] = {}
        for name, (tensor, axis) in named.items():
            if latents is not None and name == latents_name:
                tensors[_LATENTS] = samples_of(latents.moving(tensor, latents.row_axis))
                if (rest := latents.staying(tensor)) is not None:
                    tensors[name] = samples_of(rest)
            elif tensor.numel():
                tensors[name] = samples_of(tensor[None] if axis is None else tensor.movedim(axis, 0))
        with self._mutex:
            waiting, self._unread = self._unread, []
        pending = {id(item.tensor): item.tensor for item in waiting if item.tensor is not None}
        found = read({**tensors, **{f"{_RETURNED}{key}": tensor for key, tensor in pending.items()}})
        for item in waiting:
            if item.tensor is not None:
                item.values, item.tensor = found[f"{_RETURNED}{id(item.tensor)}"][item.row], None
        times = _times(found.pop(time_name)) if time_name in found else None
        moving = found.pop(_LATENTS, None)
        conditions = [
            {name: found[name][row if len(found[name]) == rows else 0] for name in tensors if name in found}
            for row in range(rows)
        ]
        return Identity(
            rows,
            None if moving is None else [moving[row if len(moving) == rows else 0] for row in range(rows)],
            conditions,
            None if times is None else [float(times[row if len(times) == rows else 0]) for row in range(rows)],
            context,
        )

    def place(self, identity: Identity, branches: Sequence[ResidualBranch]) -> Placed:
        """Find for every row the trajectory, the step and the caches that it continues, and claim these."""
        known = known_trajectory.get()
        with self._mutex:
            self._call += 1
            rows: list[_Row] = []
            for number in range(identity.rows):
                row = self._place_row(identity, number, rows, known)
                if row.stream is not None:
                    row.stream.busy = True
                rows.append(row)
            return self._placed(identity, rows, branches)

    def _placed(self, identity: Identity, rows: list[_Row], branches: Sequence[ResidualBranch]) -> Placed:
        sources = [None if not row.has_caches or row.stream is None else row.stream for row in rows]
        first = sources[0]
        whole = first is not None and all(
            source is not None and source.state is first.state and source.row == number
            for number, source in enumerate(sources)
        )
        if whole and first is not None and self._rows_of(first.state) == len(rows):
            state = first.state
        else:
            state = gathered([None if source is None else (source.state, source.row) for source in sources], branches)
        steps = np.array([row.position.step for row in rows], dtype=np.int64)
        before = tuple(None if row.position.parent is None else row.position.parent.time for row in rows)
        state.timestep_before = before[int(steps.argmax())]
        starts = all(row.position.step == 0 and row.stream is None for row in rows)
        times = tuple(row.position.time for row in rows)
        return Placed(state, steps, times, before, starts, rows, self._call, identity.context)

    def _rows_of(self, state: CacheState) -> int:
        return max(
            (stream.row + 1 for item in self._alive for stream in item.streams if stream.state is state), default=0
        )

    def _place_row(self, identity: Identity, number: int, placed: Sequence[_Row], known: Known | None) -> _Row:
        conditions = identity.conditions[number]
        time = None if identity.times is None else identity.times[number]
        latents = None if identity.latents is None else identity.latents[number]
        if known is not None:
            position = self._told_position(known, number, placed, latents, time)
        else:

            @cache
            def agrees(trajectory: Trajectory, at: Position | None = None) -> bool:
                return any(
                    stream.context == identity.context
                    and (at is None or stream.position is at)
                    and all(trajectory.moves(name) for name in differing(stream.conditions, conditions))
                    for stream in trajectory.streams
                )

            found = self._found_position(latents, time, placed, agrees)
            position = found or self._first_position(latents, time)
        stream = self._stream_at(position, conditions, identity.context, placed)
        repeated = stream is not None and stream.position is position
        usable = stream is not None and not repeated and (stream.returned is None or stream.returned.is_finite)
        return _Row(position, stream, conditions, usable)

    def _first_position(self, latents: Floats | None, time: float | None) -> Position:
        trajectory = Trajectory(first_time=time)
        self._start(trajectory)
        return Position(trajectory, 0, time, latents)

    def _start(self, trajectory: Trajectory) -> None:
        """Forget what has come to its end, and what nobody has continued for long."""
        limit = max(IDLE_CALLS, 8 * len(self._alive))
        self._alive = [
            item
            for item in self._alive
            if any(stream.busy for stream in item.streams) or (not item.ends and self._call - item.last_call <= limit)
        ]
        trajectory.last_call = self._call
        self._alive.append(trajectory)

    def _found_position(
        self,
        latents: Floats | None,
        time: float | None,
        placed: Sequence[_Row],
        agrees: Callable[..., bool],
    ) -> Position | None:
        """Where a row stands: at the position of an earlier call, or one step behind it.

        Of several that it may follow from, one with a stream of the same conditions comes first, then one that time
        does not turn back from, then the one that explains the latents best.
        """
        here = {id(row.position): row.position for row in placed}
        for position in here.values():
            if is_at(position, latents, time):
                return position
        leaves = {
            id(stream.position): stream.position
            for trajectory in sorted(self._alive, key=lambda item: -item.last_call)
            if trajectory.key is None
            for stream in trajectory.streams
        }
        repeated = None
        for position in leaves.values():
            if is_at(position, latents, time):
                if not agrees(position.trajectory, position):
                    return position  # the same step of another stream
                repeated = repeated or position
        if latents is None:
            latest = next(iter(leaves.values()), None)
            return None if latest is None else next_position(latest, latents, time)
        if not np.isfinite(latents).all():
            return repeated
        ranked: list[tuple[tuple[bool, bool, float], Position, bool]] = []
        likely = sorted(
            leaves.values(), key=lambda item: (not agrees(item.trajectory), turns_back(item, time), away(item, time))
        )
        for position in likely:
            known_here = position.latents is None or is_at(position, latents, time)
            if known_here or starts_over(position, time):
                continue
            rest, regressors = unexplained_share(latents, position)
            slack = 4 * np.sqrt(2 * regressors) / max(len(latents) - 1, 1)
            rank = (not agrees(position.trajectory), turns_back(position, time), rest)
            ranked.append((rank, position, rest <= max(EXACT, RELATED - slack)))
            if rank < (False, False, CERTAIN):
                break
        best = min((item for item in ranked if item[2]), key=lambda item: item[0], default=None)
        if best is None or is_ambiguous(best[0], best[1], [item[:2] for item in ranked]):
            return repeated
        if repeated is not None and repeated.trajectory.last_call >= best[1].trajectory.last_call:
            return repeated  # called again just now, and not a request that is sampled again
        return next_position(best[1], latents, time)

    def _told_position(
        self, known: Known, number: int, placed: Sequence[_Row], latents: Floats | None, time: float | None
    ) -> Position:
        """The host says which trajectory this is; rows of one key are told by their order."""
        key = known.keys[number if len(known.keys) > 1 else 0]
        step = known.steps[number if len(known.steps) > 1 else 0]
        full_key = (key, number if len(known.keys) == 1 else known.keys[:number].count(key))
        for row in placed:
            if row.position.trajectory.key == full_key:
                return row.position
        trajectory = next((item for item in self._alive if item.key == full_key), None)
        if trajectory is None:
            trajectory = Trajectory(full_key, first_time=time)
            self._start(trajectory)
        current = max((stream.position for stream in trajectory.streams), key=lambda item: item.step, default=None)
        if current is None:
            return Position(trajectory, step or 0, time, latents)
        if step is None:
            step = current.step + (0 if is_at(current, latents, time) else 1)
        if step == current.step:
            return current
        if step < current.step:  # the host starts this trajectory again
            trajectory.streams.clear()
            return Position(trajectory, step, time, latents)
        return Position(trajectory, step, time, latents, current)

    def _stream_at(
        self, position: Position, conditions: Mapping[str, Floats], context: object, placed: Sequence[_Row]
    ) -> Stream | None:
        """The stream of the same conditions that was called at this position or before it, the latest first."""
        trajectory = position.trajectory
        taken = {id(row.stream) for row in placed if row.stream is not None}
        candidates = [
            stream
            for stream in trajectory.streams
            if not stream.busy
            and id(stream) not in taken
            and stream.context == context
            and position.descends_from(stream.position)
        ]
        candidates.sort(key=lambda stream: (stream.position is position, -stream.call, stream.row))
        found = None
        for stream in candidates:
            others = differing(stream.conditions, conditions)
            if stream.position is not position:
                self._learn(trajectory, position.step, conditions, others)
            if found is None and all(trajectory.moves(name) for name in others):
                found = stream
        return found

    @staticmethod
    def _learn(trajectory: Trajectory, step: int, conditions: Mapping[str, Floats], differing: set[str]) -> None:
        for name in conditions:
            if name in differing:
                trajectory.changed.setdefault(name, set()).add(step)
            else:
                trajectory.kept[name] = trajectory.kept.get(name, 0) + 1

    # What becomes of a call ---------------------------------------------------------------------------------------

    def commit(self, placed: Placed, returned: Tensor | None) -> None:
        """A call has succeeded.

        Args:
            returned: what its rows returned, by :func:`~lazy_compile.runtime.fingerprint.samples_of`; None if unknown.
        """
        with self._mutex:
            for number, row in enumerate(placed.rows):
                answer = None if returned is None else Returned(returned, number if len(returned) > number else 0)
                trajectory, stream = row.position.trajectory, row.stream
                if answer is not None:
                    repeated = None if stream is None or stream.position is not row.position else stream.returned
                    others = [item for item in row.position.returned if item is not repeated]
                    row.position.returned = [*others, answer]
                    self._unread.append(answer)
                if stream is None:
                    stream = Stream(row.conditions, placed.context, placed.state, number, row.position, placed.call)
                    trajectory.streams.append(stream)
                stream.conditions, stream.state, stream.row = row.conditions, placed.state, number
                stream.position, stream.call, stream.returned, stream.busy = row.position, placed.call, answer, False
                trajectory.last_call = self._call
                forget_latents(row.position)
                trajectory.ends = ends(row.position)
                if trajectory not in self._alive:
                    self._alive.append(trajectory)

    def abandon(self, placed: Placed) -> None:
        """A call has failed: nothing of it is remembered."""
        with self._mutex:
            for row in placed.rows:
                if row.stream is not None:
                    row.stream.busy = False
            self._alive = [item for item in self._alive if item.streams]

    # Step invariants ----------------------------------------------------------------------------------------------

    def invariants(self, placed: Placed) -> StepInvariants | None:
        with self._mutex:
            found = self._invariants.get(id(placed.state))
            return None if found is None or found[0] is not placed.state else found[1]

    def keep_invariants(self, placed: Placed, invariants: StepInvariants | None) -> None:
        with self._mutex:
            alive = {id(stream.state) for item in self._alive for stream in item.streams} | {id(placed.state)}
            self._invariants = {key: value for key, value in self._invariants.items() if key in alive}
            if invariants is not None:
                self._invariants[id(placed.state)] = (placed.state, invariants)

    # All of it ----------------------------------------------------------------------------------------------------

    def reset(self, stream: str | None = None) -> None:
        """Forget the caches of all streams, or of those of one name."""
        with self._mutex:
            if stream is None:
                self._alive, self._unread, self._invariants = [], [], {}
                return
            for item in self._alive:
                item.streams = [each for each in item.streams if not _is_named(each, stream)]
            self._alive = [item for item in self._alive if item.streams]

    def end(self, keys: Sequence[Hashable]) -> None:
        """Trajectories of these names are over."""
        with self._mutex:
            self._alive = [item for item in self._alive if item.key is None or item.key[0] not in keys]  # type: ignore[index]

    @property
    def bytes(self) -> int:
        with self._mutex:
            states = {id(each.state): each.state for item in self._alive for each in item.streams}
            kept = sum(self._invariants[key][1].bytes for key in states if key in self._invariants)
            return kept + sum(state.bytes for state in states.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Trajectories:
        return Trajectories()

    def __reduce__(self) -> tuple[type[Trajectories], tuple[()]]:
        return Trajectories, ()


def _times(values: Floats) -> Floats:
    """The noisiest of each row, where it has one for each frame; their norm comes last."""
    result: Floats = (values if values.shape[1] == 1 else values[:, :-1]).max(axis=1)
    return result


_ALL: WeakSet[Trajectories] = WeakSet()


def _renew_locks() -> None:
    """A child of fork has one thread: nobody there will release what another one held."""
    for trajectories in _ALL:
        trajectories._mutex = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


_LATENTS = "the latents"
_RETURNED = "returned "


def _is_named(stream: Stream, name: str) -> bool:
    return isinstance(stream.context, tuple) and stream.context[0] == name
