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
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
from torch import Tensor

from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.runtime.cache import CacheState, gathered
from lazy_compile.runtime.fingerprint import LATENTS, Floats, Latents, read, samples_of
from lazy_compile.runtime.host_hints import Known, known_trajectory
from lazy_compile.runtime.matching import Content, Leaves, find_position, find_stream, was_called_here
from lazy_compile.runtime.placed_call import Placed, Row
from lazy_compile.runtime.positions import REACH, Doubt, Position, Returned, Stream, Trajectory
from lazy_compile.runtime.sampler_steps import SamplerSteps, named_steps, note_sampler_steps
from lazy_compile.runtime.step_invariants import StepInvariants

logger = logging.getLogger("lazy_compile")


IDLE_CALLS = 128
"""A trajectory that was not continued for as many calls, and 8 for each that is alive, is forgotten."""


class Trajectories:
    """What is known of the calls of one model, whatever threads they come from."""

    def __init__(self) -> None:
        self._alive: list[Trajectory] = []
        self._mutex = threading.Lock()
        self._call = 0
        self._unread: list[Returned] = []
        self._steps = SamplerSteps()
        self._invariants: dict[int, tuple[CacheState, StepInvariants]] = {}
        _ALL.add(self)

    # Placing a call -----------------------------------------------------------------------------------------------

    def identify(
        self,
        named: Mapping[str, tuple[Tensor, int | None]],
        latents: Latents | None,
        names: Sequence[str],
        time_name: str | None,
        rows: int,
        context: object,
    ) -> list[Content]:
        """Read what identifies the rows of a call, with what earlier calls returned, by one copy from each device.

        Args:
            named: the tensors of the call by name, with the axis of their rows; None for one that all rows share.
            latents: where the latents are, in the inputs of the model, called ``names``.
            time_name: the name of the time input.
            rows: how many there are; 1 where they cannot be taken apart.
            context: see :class:`~lazy_compile.runtime.positions.Stream`.
        """
        if any(tensor.is_meta for tensor, _ in named.values()):
            return [Content(None, None, {}, context)] * rows
        tensors: dict[str, Tensor] = {}
        is_joint = False
        moving_names = [] if latents is None else [names[position] for position in latents.positions]
        beside = {} if latents is None else {names[each.position]: each for each in latents.companions}
        for name, (tensor, axis) in named.items():
            if latents is not None and name in moving_names:
                if (rest := latents.staying(tensor)) is not None:
                    tensors[name] = samples_of(rest)
            elif name in beside and tensor.numel():
                tensors[name] = samples_of(beside[name].moving(tensor, beside[name].row_axis))
                if (rest := beside[name].staying(tensor)) is not None:
                    tensors[f"{name}, the rest"] = samples_of(rest)
            elif tensor.numel():
                tensors[name] = samples_of(tensor[None] if axis is None else tensor.movedim(axis, 0))
        if latents is not None:
            moved = [named[name][0] for name in moving_names]
            is_joint = latents.row_axis is None and sum(len(tensor) for tensor in moved) > 1
            tensors[LATENTS] = samples_of(latents.together(moved, latents.row_axis))
        with self._mutex:  # what another thread is about to read, too: a row is not placed before its own is there
            waiting, steps = [(item, item.tensors) for item in self._unread], self._steps.waiting()
        pending = {f"{_RETURNED}{id(each)}": each for _, returned in waiting for each in returned.values()}
        found = read({**tensors, **named_steps(steps), **pending})
        with self._mutex:
            for item, returned in waiting:
                item.take({name: found[f"{_RETURNED}{id(each)}"] for name, each in returned.items()})
            self._unread = [item for item in self._unread if item.tensors]
            if steps:
                note_sampler_steps(found, Leaves(self._alive).positions)
                self._steps.drop(steps)
        times = _times(found.pop(time_name)) if time_name in found else None
        moving = found.pop(LATENTS, None)
        if times is not None:
            found = {name: values for name, values in found.items() if not _is_time(values, times)}

        def of(values: Floats, row: int) -> Any:
            return values[row if len(values) == rows else 0]

        return [
            Content(
                None if moving is None else of(moving, row),
                None if times is None else float(of(times, row)),
                {name: of(found[name], row) for name in tensors if name in found},
                context,
                is_joint,
            )
            for row in range(rows)
        ]

    def place(self, contents: Sequence[Content], branches: Sequence[ResidualBranch]) -> Placed:
        """Find for every row the trajectory, the step and the caches that it continues, and claim these."""
        known = known_trajectory.get()
        with self._mutex:
            self._call += 1
            rows: list[Row] = []
            here: dict[object, list[Position]] = {}
            taken: set[int] = set()
            alive, leaves = self._alive, Leaves(self._alive)
            for number, content in enumerate(contents):
                companions = here.setdefault(content.spot, [])
                if known is not None:
                    position = self._told_position(known, number, rows, content)
                else:
                    if alive is not self._alive:  # a row that started a trajectory has made others forgotten
                        alive, leaves = self._alive, Leaves(self._alive)
                    found, doubt = find_position(content, leaves, companions, number)
                    position = found or self._first_position(content, doubt)
                if not any(position is other for other in companions):
                    companions.append(position)
                rows.append(self._row_at(position, content, taken))
                taken.add(id(rows[-1].stream))
            return self._placed(contents[0].context, rows, branches)

    @staticmethod
    def _row_at(position: Position, content: Content, taken: Collection[int]) -> Row:
        """A row whose position is known, with its stream, which it claims."""
        stream = find_stream(position, content, taken)
        if stream is None:
            return Row(position, None, content, False, was_called_here(position, content))
        stream.busy = True
        return Row(position, stream, content, stream.returned is None or stream.returned.is_finite, False)

    def _placed(self, context: object, rows: list[Row], branches: Sequence[ResidualBranch]) -> Placed:
        sources = [None if not row.has_caches or row.stream is None else row.stream for row in rows]
        first = sources[0]
        whole = first is not None and all(
            source is not None and source.state is first.state and source.row == number
            for number, source in enumerate(sources)
        )
        if whole and first is not None and first.rows == len(rows):
            state = first.state
        else:
            state = gathered([None if source is None else (source.state, source.row) for source in sources], branches)
        steps = np.array([row.position.step for row in rows], dtype=np.int64)
        before = tuple(None if row.position.parent is None else row.position.parent.time for row in rows)
        state.timestep_before = before[int(steps.argmax())]
        unrelated = all(row.stream is None for row in rows)
        times = tuple(row.position.time for row in rows)
        return Placed(state, steps, times, before, unrelated, rows, self._call, context)

    def _first_position(self, content: Content, doubt: Doubt | None) -> Position:
        trajectory = Trajectory(None, content.time, content.latents)
        if doubt is not None:
            trajectory.lineage = doubt.lineage
        self._start(trajectory)
        unexplained = None if doubt is None else doubt.unexplained
        return Position(trajectory, 0, content.time, content.latents, unexplained=unexplained, doubt=doubt)

    def _start(self, trajectory: Trajectory) -> None:
        """Forget what has come to its end, and what nobody has continued for long.

        Times tell an end by the length of the last step alone: among several requests there is no hurry.
        """
        limit = max(IDLE_CALLS, 8 * len(self._alive))
        several = any(not stream.is_over for item in self._alive for stream in item.streams)
        patience = 4 * sum(len(item.streams) for item in self._alive) if several else 0
        kept = [trajectory]
        for item in self._alive:
            if any(stream.busy for stream in item.streams) or not item.streams:  # it is called just now
                kept.append(item)
                continue
            item.streams = [each for each in item.streams if self._call - each.call < patience or not each.is_over]
            if item.streams and self._call - item.last_call <= limit:
                kept.append(item)
            else:
                _free([item])
        trajectory.last_call = self._call
        self._alive = kept

    def _told_position(self, known: Known, number: int, placed: Sequence[Row], content: Content) -> Position:
        """The host says which trajectory this is; rows of one key are told by their order."""
        latents, time = content.latents, content.time
        key = known.keys[number if len(known.keys) > 1 else 0]
        step = known.steps[number if len(known.steps) > 1 else 0]
        full_key = (key, number if len(known.keys) == 1 else known.keys[:number].count(key))
        for row in placed:
            if row.position.trajectory.key == full_key:
                return row.position
        trajectory = next((item for item in self._alive if item.key == full_key), None)
        if trajectory is None:
            trajectory = Trajectory(full_key, time, latents)
            self._start(trajectory)
        current = max((stream.position for stream in trajectory.streams), key=lambda item: item.step, default=None)
        if current is None:
            return Position(trajectory, step or 0, time, latents)
        if step is None:
            step = current.step + (0 if content.is_at(current) else 1)
        if step == current.step:
            return current
        if step < current.step:  # the host starts this trajectory again
            trajectory.streams.clear()
            return Position(trajectory, step, time, latents)
        return Position(trajectory, step, time, latents, current)

    def note_step(self, before: Tensor, after: Tensor) -> None:
        """The host has seen its sampler make a step, see :class:`~lazy_compile.runtime.sampler_steps.SamplerSteps`."""
        with self._mutex:
            self._steps.note(before, after)

    # What becomes of a call ---------------------------------------------------------------------------------------

    def commit(self, placed: Placed, returned: Mapping[str, Tensor]) -> None:
        """A call has succeeded.

        Args:
            returned: see :meth:`~lazy_compile.runtime.fingerprint.Latents.returned`; empty if unknown.
        """
        with self._mutex:
            for number, row in enumerate(placed.rows):
                self._commit_row(placed, number, row, Returned(returned, number) if returned else None)

    def _commit_row(self, placed: Placed, number: int, row: Row, answer: Returned | None) -> None:
        trajectory, stream, conditions = row.position.trajectory, row.stream, row.content.conditions
        if answer is not None:
            row.position.returned = [*row.position.returned, answer]
            self._unread.append(answer)
        left = None if stream is None else stream.position
        rows = len(placed.rows)
        if stream is None:
            stream = Stream(conditions, placed.context, placed.state, number, rows, row.position, placed.call)
            stream.is_spare = row.is_repeated
            trajectory.streams.append(stream)
        stream.conditions, stream.state, stream.row, stream.rows = conditions, placed.state, number, rows
        stream.position, stream.call, stream.returned, stream.busy = row.position, placed.call, answer, False
        trajectory.last_call = self._call
        trajectory.note_parted(stream)
        behind = [] if left is None else [left, *left.ancestors()]
        trajectory.forget_latents([*behind, *row.position.ancestors(REACH + 1)])
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
            self._forget_invariants(placed.state)
            if invariants is not None:
                self._invariants[id(placed.state)] = (placed.state, invariants)

    def _forget_invariants(self, called: CacheState | None = None) -> None:
        """Of all streams but those that are known, and the one that is called just now."""
        alive = {id(stream.state) for item in self._alive for stream in item.streams} | {id(called)}
        self._invariants = {key: value for key, value in self._invariants.items() if key in alive}

    # All of it ----------------------------------------------------------------------------------------------------

    def reset(self, stream: str | None = None) -> None:
        """Forget the caches of all streams, or of those of one name."""
        with self._mutex:
            if stream is None:
                _free(self._alive)
                self._alive, self._unread, self._invariants = [], [], {}
                self._steps.clear()
                return
            for item in self._alive:
                item.streams = [each for each in item.streams if not _is_named(each, stream)]
            self._alive = [item for item in self._alive if item.streams]
            self._forget_invariants()

    def forget_finished(self) -> None:
        """Forget the caches of trajectories that have come to their end."""
        with self._mutex:
            for item in self._alive:
                item.streams = [each for each in item.streams if each.busy or not each.is_over]
            self._alive = [item for item in self._alive if item.streams]
            self._forget_invariants()

    def end(self, keys: Sequence[Hashable]) -> None:
        """Trajectories of these names are over."""
        with self._mutex:
            over = [item for item in self._alive if item.key is not None and item.key[0] in keys]  # type: ignore[index]
            _free(over)
            self._alive = [item for item in self._alive if item not in over]
            self._forget_invariants()

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


def _free(forgotten: Sequence[Trajectory]) -> None:
    """Free the caches of trajectories at once: as these and their streams refer to each other, they would wait for a
    garbage collector, which knows nothing of the memory of a device."""
    for item in forgotten:
        item.streams = [stream for stream in item.streams if stream.busy]


def _times(values: Floats) -> Floats:
    """The noisiest of each row, where it has one for each frame; their norm comes last."""
    result: Floats = (values if values.shape[1] == 1 else values[:, :-1]).max(axis=1)
    return result


def _is_time(values: Floats, times: Floats) -> bool:
    """Whether an input is the time once more, such as a sigma beside the timestep; it is none of the conditions."""
    given = values if values.shape[1] == 1 else values[:, :-1]
    return (len(given) == len(times) or 1 in (len(given), len(times))) and bool((given == times[:, None]).all())


_ALL: WeakSet[Trajectories] = WeakSet()


def _renew_locks() -> None:
    """A child of fork has one thread: nobody there will release what another one held."""
    for trajectories in _ALL:
        trajectories._mutex = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


_RETURNED = "returned "


def _is_named(stream: Stream, name: str) -> bool:
    return isinstance(stream.context, tuple) and stream.context[0] == name
