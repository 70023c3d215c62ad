"""Steps of trajectories, and how the latents of a row tell which one it makes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.fingerprint import Floats, same, unexplained

EXACT = 2.5e-3
"""Share of the latents (of their squares) that may stay unexplained where a step is a sum of what was there before."""


CERTAIN = 1e-9
"""What numbers of single precision leave unexplained; no other trajectory needs to be looked at."""


RELATED = 0.75
"""The same where the sampler adds noise or clips. Latents of two requests leave about 1."""


MARGIN = 0.1
"""How much more another trajectory must leave unexplained where a sampler adds noise or clips."""


@dataclass(eq=False)
class Position:
    """One step of a trajectory: the latents that the model was called with, and what it returned.

    Attributes:
        latents: the sampled row; None once two steps have followed.
        returned: what each stream returned; tensors until they are read.
    """

    trajectory: Trajectory
    step: int
    time: float | None
    latents: Floats | None
    parent: Position | None = None
    returned: list[Returned] = field(default_factory=list)

    def descends_from(self, other: Position) -> bool:
        position: Position | None = self
        while position is not None:
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
        state: where its caches are, and ``row`` which row it is there.
        position: where it was called last.
        call: number of that call.
    """

    conditions: Mapping[str, Floats]
    context: object
    state: CacheState
    row: int
    position: Position
    call: int
    busy: bool = False
    returned: Returned | None = None


@dataclass(eq=False)
class Trajectory:
    """One request, from its noise on; requests that start from the same noise share one until they part.

    Attributes:
        key: what the host calls it, and which of its rows it is; None if it says nothing.
        first_time: the time input at its first call.
        kept, changed: for each input how often a row had it unchanged, and the steps at which none had.
    """

    key: Hashable = None
    first_time: float | None = None
    streams: list[Stream] = field(default_factory=list)
    last_call: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    changed: dict[str, set[int]] = field(default_factory=dict)
    ends: bool = False

    def moves(self, name: str) -> bool:
        """Whether an input is no condition: it changed at two steps for every stream, and never stayed."""
        return self.kept.get(name, 0) == 0 and len(self.changed.get(name, ())) >= 2


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


def is_ambiguous(
    rank: tuple[bool, bool, float], position: Position, others: Sequence[tuple[tuple[bool, bool, float], Position]]
) -> bool:
    """Whether latents that are only related to a position are related to one of another trajectory about as much."""
    return rank[2] > EXACT and any(
        other[:2] == rank[:2] and elsewhere.trajectory is not position.trajectory and other[2] - rank[2] < MARGIN
        for other, elsewhere in others
    )


def turns_back(position: Position, time: float | None) -> bool:
    """Whether time moves against the direction in which the trajectory has come."""
    first = position.trajectory.first_time
    if first is None or time is None or position.time is None or position.time == first:
        return False
    return (time > position.time) == (position.time < first)


def away(position: Position, time: float | None) -> float:
    """How far a call is from a position in time."""
    return 0.0 if time is None or position.time is None else abs(time - position.time)


def next_position(position: Position, latents: Floats | None, time: float | None) -> Position:
    return Position(position.trajectory, position.step + 1, time, latents, position)


def _finite(returned: Sequence[Returned], latents: Floats) -> list[Floats]:
    """What was returned in the shape of the latents, and is finite."""
    values = [item.values for item in returned if item.values is not None and item.values.shape == latents.shape]
    return [value[:-1] for value in values if np.isfinite(value).all()]


def unexplained_share(latents: Floats, position: Position) -> tuple[float, int]:
    """What of the latents does not follow from a position, and the number of things that it may follow from."""
    assert position.latents is not None
    target = latents[:-1]
    if position.latents.shape != latents.shape:
        return 1.0, 1
    now = _finite(position.returned, latents)
    near = [position.latents[:-1], *now[:4]]
    rest = unexplained(target, near)
    parent = position.parent
    if rest <= EXACT or parent is None or parent.latents is None or parent.latents.shape != latents.shape:
        return rest, len(near)
    older = _finite(parent.returned, latents)
    far = [*near, parent.latents[:-1], *older[:4], np.ones_like(target)]
    if len(target) < 4 * len(far):
        return rest, len(near)
    exact = unexplained(target, far)
    return (exact, len(far)) if exact <= EXACT else (rest, len(near))


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
    top = 1.0 if position.time <= 1.0 else 1000.0
    return move > 0 and position.time + move >= top


def forget_latents(position: Position) -> None:
    """Keep what the next two steps may follow from."""
    parent = position.parent
    older = None if parent is None else parent.parent
    if older is not None:
        older.latents, older.returned = None, []
