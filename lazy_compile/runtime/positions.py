"""Steps of trajectories, and how the latents of a row tell which one it makes."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from torch import Tensor

from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.fingerprint import Floats, same, unexplained

EXACT = 2.5e-3
"""Share of the latents (of their squares) that may stay unexplained where a step is a sum of what was there before."""


CERTAIN = 1e-9
"""What numbers of single precision leave unexplained at most."""


PROPORTIONAL = 1e-12
"""What stays unexplained of latents in single precision that were multiplied by a number."""


HALF = 1e-4
"""What half precision leaves unexplained, or a multistep method that remembers more steps than are looked at."""


FINE = 1e-7
"""What may stay unexplained before further steps are asked."""


RELATED = 0.75
"""The same where the sampler adds noise or clips. Latents of two requests leave about 1."""


MARGIN = 0.1
"""How much more the step of another request must leave unexplained where a sampler adds noise or clips."""


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

    def descends_from(self, other: Position) -> bool:
        position: Position | None = self
        while position is not None and position.step >= other.step:
            if position is other:
                return True
            position = position.parent
        return False


@dataclass(eq=False)
class Returned:
    """What one row of a call returned, in samples; on the device until somebody asks."""

    tensor: Tensor | None
    row: int
    values: Floats | None = None

    @property
    def is_finite(self) -> bool:
        return self.values is None or bool(np.isfinite(self.values).all())


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


@dataclass(frozen=True, order=True)
class Fit:
    """How well a row follows from a position; the smallest is the best.

    Attributes:
        level: of what does not follow: 0 for what single precision mostly leaves, 1 for what it leaves at most, 2 for
            what half precision does, 3 for what a long step does; then the latents are only related, as those of
            samplers that add noise or clip.
        is_indirect: the step before takes part.
        is_new: no stream of the same conditions leads there.
        turns_back: time turns back from there.
        closeness: of what is only related, in powers of four; nothing else says more of whose noise it is.
        may_turn_back: the same, or nobody knows, after a first step.
        rests: related, and called at the same time.
        distance: in time, where more than related: several positions of a straight path explain a row as well.
        unexplained: the share of the latents that does not follow.
        is_doubtful: more is left unexplained than the sampler has left before: the row may begin another request that
            looks alike, from the same noise or image.
    """

    level: int
    is_indirect: bool
    is_new: bool
    turns_back: bool
    closeness: int
    may_turn_back: bool
    rests: bool
    distance: float
    unexplained: float
    is_doubtful: bool

    @property
    def is_acceptable(self) -> bool:
        """Latents that are only related, where time may turn back and no stream leads, are those of another request."""
        return not (self.is_only_related and self.is_new and self.may_turn_back)

    @property
    def is_proof(self) -> bool:
        """Whether the row follows from the position and what was returned there, to the last digits."""
        return self.level == 0 and not self.is_indirect

    @property
    def is_only_related(self) -> bool:
        return self.level == len(_LEVELS)


def level_of(unexplained: float) -> int:
    return int(np.searchsorted(_LEVELS, unexplained))


_LEVELS = PROPORTIONAL, CERTAIN, HALF, EXACT


def is_ambiguous(fit: Fit, position: Position, others: Sequence[tuple[Fit, Position]]) -> bool:
    """Whether latents that are only related to a position are related to one of another request about as much."""
    return fit.is_only_related and any(
        other.unexplained - fit.unexplained < MARGIN
        and not _are_in_line(position, elsewhere)
        and not is_at(elsewhere, position.latents, position.time)
        for other, elsewhere in others
    )


def _are_in_line(first: Position, second: Position) -> bool:
    if first.trajectory is not second.trajectory:
        return first.trajectory.lineage is second.trajectory.lineage
    return first.descends_from(second) or second.descends_from(first)


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


def _finite(returned: Sequence[Returned], latents: Floats) -> list[Floats]:
    """What was returned in the shape of the latents, and is finite; each once, since calls may be made again."""
    found: dict[bytes, Floats] = {}
    for item in returned:
        if item.values is not None and item.values.shape == latents.shape and np.isfinite(item.values).all():
            found.setdefault(item.values[:-1].tobytes(), item.values[:-1])
    return list(found.values())


def _is_like(values: Floats | None, latents: Floats) -> TypeGuard[Floats]:
    return values is not None and values.shape == latents.shape


def unexplained_share(latents: Floats, position: Position) -> tuple[float, bool, int]:
    """What of the latents does not follow from a position, whether the step before takes part, and the number of things
    that they may follow from.

    The step before takes part beside what was returned at this one: a sum without that is a step beside this one. Where
    that is not enough, so does what was returned at the steps before it.
    """
    assert position.latents is not None
    target, here = latents[:-1], position.latents[:-1]
    if position.latents.shape != latents.shape:
        return 1.0, False, 1
    limit = max(4, min(16, len(target) // 8))
    returned = _finite(position.returned, latents)[:limit]
    rest = unexplained(target, [here, *returned])
    parent = position.parent
    if rest <= CERTAIN or parent is None or not _is_like(parent.latents, latents):
        return rest, False, 1 + len(returned)
    older = [here, parent.latents[:-1], *_finite(parent.returned, latents)[:limit], np.ones_like(target)]
    if len(target) < len(older + returned) + SPARE:
        return rest, False, 1 + len(returned)
    exact = unexplained(target, older + returned)
    if exact > FINE:
        further = [value for each in parent.ancestors(REACH - 1) for value in _finite(each.returned, latents)[:limit]]
        further += [each.latents[:-1] for each in parent.ancestors(REACH - 1) if _is_like(each.latents, latents)]
        if further and len(target) >= len(older + returned + further) + SPARE:
            older += further
            exact = unexplained(target, older + returned)
    is_beside = exact <= CERTAIN and returned and unexplained(target, older) <= CERTAIN
    if exact > EXACT or level_of(exact) >= level_of(rest) or is_beside:
        return rest, False, 1 + len(returned)
    return exact, True, len(older + returned)


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
