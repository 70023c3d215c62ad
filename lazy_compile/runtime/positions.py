"""Steps of trajectories, and the streams that stand at them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.fingerprint import Floats, same, unexplained

PROPORTIONAL = 1e-12
"""What stays unexplained of latents in single precision that were multiplied by a number."""


HALF = 1e-4
"""What half precision leaves unexplained, or a multistep method that remembers more steps than are looked at."""


REACH = 3
"""Steps before one that the next may follow from, as those of a multistep method of order 4 (PNDM, LMS) do."""


RISE = 10.0
"""How much more than one of the last two steps a step may leave unexplained, beyond rounding."""


SPARE = 12
"""How many more numbers latents must have than things that they may follow from: those of another request then leave
no more than EXACT once in 10^12 times, as the beta distribution of what a projection leaves says."""


@dataclass(frozen=True)
class Doubt:
    """A step that another one may follow.

    Attributes:
        step: of its trajectory.
        unexplained: the share of the latents that would be noise.
        lineage: see :class:`Trajectory`.
    """

    step: int
    unexplained: float
    lineage: object


@dataclass(eq=False)
class Position:
    """One step of a trajectory: the latents that the model was called with, and what it returned.

    Attributes:
        latents: the sampled row; None once no next step can follow from it.
        returned: what each stream returned; tensors until they are read.
        unexplained: the share of the latents that does not follow from the steps before; None if nobody has looked.
        doubt: of the first step of a trajectory: what it may follow, if the sampler adds noise.
    """

    trajectory: Trajectory
    step: int
    time: float | None
    latents: Floats | None
    parent: Position | None = None
    returned: list[Returned] = field(default_factory=list)
    unexplained: float | None = None
    doubt: Doubt | None = None

    def ancestors(self, count: int = REACH) -> list[Position]:
        """The steps before, the latest first."""
        found: list[Position] = []
        position = self.parent
        while position is not None and len(found) < count:
            found.append(position)
            position = position.parent
        return found

    def believes(self, unexplained: float, time: float | None) -> bool:
        """Whether a step may leave so much unexplained: as the last two did, about, but for rounding.

        The first one may add any noise, if it is no longer than half of the way.
        """
        if self.unexplained is None:
            return unexplained <= HALF or away(self, time) <= _way(self.time) / 2
        last = self if self.parent is None else self.parent
        return unexplained <= max(HALF, RISE * self.unexplained, RISE * (last.unexplained or 0.0))

    def steps_before(self) -> int:
        """How many steps there were before the first of the trajectory, if the next one shows that noise is added."""
        position = self
        while position.parent is not None:
            if (position.unexplained or 0.0) > HALF:  # it is counted already
                return 0
            position = position.parent
        return 0 if position.doubt is None else position.doubt.step + 1

    def moves(self, name: str, before: Floats, now: Floats) -> bool:
        """Whether an input beside the latents follows from what it was at this step and what was returned for it, here
        and at the steps before."""
        returned = [item.values.get(name) for position in (self, *self.ancestors()) for item in position.returned]
        basis = {each[:-1].tobytes(): each[:-1] for each in returned if each is not None and each.shape == now.shape}
        if not basis or before.shape != now.shape or not np.isfinite(now).all():
            return False
        if len(now) - 1 < 1 + len(basis) + SPARE:  # too few numbers to tell it from another
            return False
        return unexplained(now[:-1], [before[:-1], *basis.values()]) <= HALF

    def descends_from(self, other: Position) -> bool:
        position: Position | None = self
        while position is not None and position.step >= other.step:
            if position is other:
                return True
            position = position.parent
        return False


@dataclass(eq=False)
class Returned:
    """What one row of a call returned, in samples; on the device until somebody asks.

    Attributes:
        tensors: of all rows, by the input that each moves; the latents are called
            :data:`~lazy_compile.runtime.fingerprint.LATENTS`.
        row: which one of them.
        values: those of the row, once read.
    """

    tensors: Mapping[str, Tensor]
    row: int
    values: Mapping[str, Floats] = field(default_factory=dict)

    def take(self, read: Mapping[str, Floats]) -> None:
        self.values = {name: rows[self.row if self.row < len(rows) else 0] for name, rows in read.items()}
        self.tensors = {}

    @property
    def is_finite(self) -> bool:
        return all(bool(np.isfinite(values).all()) for values in self.values.values())


@dataclass(eq=False)
class Stream:
    """Calls of one trajectory under one set of conditions, for one row.

    Attributes:
        conditions: all inputs that stay, sampled.
        context: what else must agree: the name of the stream, arguments that are no tensors, the state of the model.
        state: where its caches are, ``row`` which row it is there, and ``rows`` of how many.
        position: where it was called last.
        call: number of that call.
        is_spare: whether it began where another stream of the same conditions stood: with a call that was made again.
    """

    conditions: Mapping[str, Floats]
    context: object
    state: CacheState
    row: int
    rows: int
    position: Position
    call: int
    busy: bool = False
    returned: Returned | None = None
    is_spare: bool = False

    def differs_by(self, conditions: Mapping[str, Floats]) -> set[str]:
        """The conditions of a row that are not those of the stream, nor follow from them as latents do."""
        names, before = differing(self.conditions, conditions), self.conditions
        both = [name for name in names if name in before and name in conditions]
        return names.difference(name for name in both if self.position.moves(name, before[name], conditions[name]))

    @property
    def is_over(self) -> bool:
        """Whether its trajectory has come to its end, as far as times tell.

        A stream that waits at an earlier step is over with the others. One at the first may be that of another request,
        from the same noise; a spare one, too; one a step behind may be called next.
        """
        if ends(self.position):
            return True
        if self.is_spare or self.position.parent is None:
            return False
        return any(
            ends(item.position)
            and item.position.step > self.position.step + 1
            and item.position.descends_from(self.position)
            for item in self.position.trajectory.streams
        )


@dataclass(eq=False)
class Trajectory:
    """One request, from its noise on; requests that start from the same noise share one until they part.

    Attributes:
        key: what the host calls it, and which of its rows it is; None if it says nothing.
        first_time, first_latents: at its first call.
        lineage: the same for trajectories that may be one request.
        kept, changed: for each input how often a row had it unchanged, and the steps at which none had.
        parted: what streams of one step differed by.
    """

    key: Hashable = None
    first_time: float | None = None
    first_latents: Floats | None = None
    lineage: object = field(default_factory=object)
    streams: list[Stream] = field(default_factory=list)
    last_call: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    changed: dict[str, set[int]] = field(default_factory=dict)
    parted: set[frozenset[str]] = field(default_factory=set)

    def moves(self, name: str) -> bool:
        """Whether an input is no condition: it changed at two steps for every stream, and never stayed."""
        return self.kept.get(name, 0) == 0 and len(self.changed.get(name, ())) >= 2

    @property
    def is_parted_by_what_moves(self) -> bool:
        """Whether nothing but inputs that move tells one stream from another, so that nothing says which is which."""
        return any(all(map(self.moves, names)) for names in self.parted)

    def note_parted(self, stream: Stream) -> None:
        """Remember what a stream differs by from others that stand where it does."""
        others = [other for other in self.streams if other is not stream and other.position is stream.position]
        names = {frozenset(differing(other.conditions, stream.conditions)) for other in others}
        self.parted |= names - {frozenset()}

    def begins_with(self, latents: Floats) -> bool:
        """Whether latents are its first ones, or a multiple: those of another request, from the same noise."""
        first = self.first_latents
        if first is None or first.shape != latents.shape:
            return False
        return unexplained(latents[:-1], [first[:-1]]) <= PROPORTIONAL

    def learn(self, step: int, names: Iterable[str], changed: Collection[str]) -> None:
        """Inputs of a row, held against those of a stream that leads to it."""
        for name in names:
            if name in changed:
                self.changed.setdefault(name, set()).add(step)
            else:
                self.kept[name] = self.kept.get(name, 0) + 1

    def forget_latents(self, positions: Iterable[Position | None]) -> None:
        """Of positions that no next step can follow from: of all but those where a stream stands, and some before."""
        needed = {id(item) for stream in self.streams for item in (stream.position, *stream.position.ancestors())}
        for position in positions:
            if position is not None and id(position) not in needed:
                position.latents, position.returned = None, []


def spot_of(latents: Floats | None, time: float | None) -> object:
    """What two rows have in common that are called with the same latents at the same time."""
    return time, None if latents is None else (latents.shape, *latents[:1].tolist())


def is_at(position: Position, latents: Floats | None, time: float | None) -> bool:
    """Whether a row is called at this very position: with the same latents at the same time."""
    if position.time != time or (position.latents is None) != (latents is None):
        return False
    return latents is not None and position.latents is not None and same(latents, position.latents)


def differing(before: Mapping[str, Floats], now: Mapping[str, Floats]) -> set[str]:
    """The conditions that are not those of before."""
    return {
        name
        for name in before.keys() | now.keys()
        if name not in before or name not in now or not same(before[name], now[name])
    }


def turns_back(position: Position, time: float | None) -> bool:
    """Whether time moves against the direction in which the trajectory has come."""
    first = position.trajectory.first_time
    if first is None or time is None or position.time is None or position.time == first:
        return False
    return (time > position.time) == (position.time < first)


def away(position: Position, time: float | None) -> float:
    """How far a call is from a position in time."""
    return 0.0 if time is None or position.time is None else abs(time - position.time)


def _way(time: float | None) -> float:
    """How far times go, as far as the first one tells."""
    return 1.0 if time is not None and time <= 1.0 else 1000.0 if time is not None else np.inf


def next_position(position: Position, latents: Floats | None, time: float | None, unexplained: float) -> Position:
    """The step behind a position.

    A step with noise shows that the one with which its trajectory was begun may have been one with noise, too: then
    the steps before that are counted.
    """
    skipped = position.steps_before() if unexplained > HALF else 0
    return Position(position.trajectory, position.step + 1 + skipped, time, latents, position, unexplained=unexplained)


def starts_over(position: Position, time: float | None) -> bool:
    """Whether a call is as noisy as the first of the trajectory, or noisier: such latents begin another one."""
    first = position.trajectory.first_time
    if first is None or time is None or position.time is None or position.time == first:
        return False
    return (time >= first) if position.time < first else (time <= first)


def ends(position: Position) -> bool:
    """Whether another step of the same length would leave the range of times."""
    if position.parent is None or position.time is None or position.parent.time is None:
        return False
    move = position.time - position.parent.time
    if move < 0:
        return position.time + move <= 1e-6 * abs(move) and position.time >= 0
    return move > 0 and position.time + move >= _way(position.time)
