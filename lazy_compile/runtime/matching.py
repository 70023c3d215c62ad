"""Which step of which trajectory a row of a call makes, and which stream it continues, by what the row holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lazy_compile.runtime.fingerprint import Floats
from lazy_compile.runtime.positions import (
    EXACT,
    RELATED,
    Fit,
    Position,
    Stream,
    Trajectory,
    away,
    differing,
    is_ambiguous,
    is_at,
    level_of,
    next_position,
    starts_over,
    turns_back,
    unexplained_share,
)


@dataclass(frozen=True, eq=False)
class Content:
    """What a row of a call holds.

    Attributes:
        latents: sampled; None if the model has none, or on the meta device.
        time: the time input; None if the model has none.
        conditions, context: as in :class:`~lazy_compile.runtime.positions.Stream`.
    """

    latents: Floats | None
    time: float | None
    conditions: Mapping[str, Floats]
    context: object

    def is_at(self, position: Position) -> bool:
        return is_at(position, self.latents, self.time)

    def belongs_to(self, stream: Stream) -> bool:
        """Whether the conditions of a stream are those of this row, less what moves from step to step."""
        if stream.context != self.context:
            return False
        moves = stream.position.trajectory.moves
        return all(moves(name) for name in differing(stream.conditions, self.conditions))


def find_position(content: Content, alive: Sequence[Trajectory], here: Collection[Position]) -> Position | None:
    """Where a row stands: at the position of an earlier call, or one step behind it; None if it continues nothing.

    A stream that waits to be continued comes first: one that has not been called at this position yet, or one at the
    position that the latents follow from. Then come a new stream of a position, and a call that is made again.

    Args:
        alive: the trajectories, those that were continued last first.
        here: where other rows of the call stand.
    """
    for position in here:
        if content.is_at(position):
            return position
    streams = [stream for trajectory in alive if trajectory.key is None for stream in trajectory.streams]
    own = [stream for stream in streams if content.belongs_to(stream)]
    leaves = list({id(stream.position): stream.position for stream in streams}.values())
    at = [position for position in leaves if content.is_at(position)]
    for position in at:
        if any(stream.position is not position and position.descends_from(stream.position) for stream in own):
            return position
    fit, before = _find_before(content, leaves, own)
    following = None if before is None else next_position(before, content.latents, content.time)
    if fit is not None and not fit.is_new and not fit.is_only_related:
        return following
    for position in at:
        if all(stream.position is not position for stream in own):
            return position
    if at and not (before is not None and _is_same_step(at[0].parent, before)):
        return at[0]
    return following


def _is_same_step(position: Position | None, other: Position) -> bool:
    """Whether two positions are one step of two requests that are the same: one is sampled again, say."""
    return position is not None and is_at(other, position.latents, position.time)


def _is_continued(position: Position, own: Sequence[Stream]) -> bool:
    """Whether one of these streams leads to a position."""
    return any(position.descends_from(stream.position) for stream in own)


def _find_before(
    content: Content, leaves: Sequence[Position], own: Sequence[Stream]
) -> tuple[Fit | None, Position | None]:
    """The position that the latents follow from.

    Of several, the one that explains the latents best comes first; of equals one with a stream of the same conditions,
    then one that time does not turn back from.
    """
    latents, time = content.latents, content.time
    if latents is None:
        return None, next(iter(leaves), None)
    if not np.isfinite(latents).all():
        return None, None
    flags = {id(item): (not _is_continued(item, own), turns_back(item, time)) for item in leaves}
    unmoved = {id(leaf.trajectory) for leaf in leaves if leaf.trajectory.begins_with(latents)}
    fits: list[tuple[Fit, Position]] = []
    certain: Trajectory | None = None
    for position in sorted(leaves, key=lambda item: (*flags[id(item)], away(item, time))):
        parent = position.parent
        if certain is not None and position.trajectory is not certain:
            continue
        if position.latents is None or content.is_at(position) or (parent is not None and content.is_at(parent)):
            continue
        is_another = id(position.trajectory) in unmoved and not position.trajectory.begins_with(position.latents)
        if is_another or starts_over(position, time):
            continue
        rest, is_indirect, regressors = unexplained_share(latents, position)
        level = level_of(rest)
        is_new, back = flags[id(position)]
        may_turn = back or parent is None
        related = rest > EXACT
        distance = 0.0 if related else away(position, time)
        fit = Fit(level, is_indirect, is_new, back, may_turn, related and position.time == time, distance, rest)
        if rest > max(EXACT, RELATED - 4 * np.sqrt(2 * regressors) / max(len(latents) - 1, 1)) or not fit.is_acceptable:
            continue
        fits.append((fit, position))
        if level == 0 and not is_indirect:
            break
        if level == 0:
            certain = position.trajectory
    best = min(fits, key=lambda item: item[0], default=None)
    return (None, None) if best is None or is_ambiguous(*best, fits) else best


def find_stream(position: Position, content: Content, taken: Collection[int]) -> Stream | None:
    """The stream of the same conditions that leads to a position, the latest first.

    Where all of them differ by inputs that move from step to step, the one that came closest; None if several may be
    distinguished by such inputs alone, since nothing says whose they are now.

    Args:
        taken: ids of the streams that other rows of the call continue.
    """
    trajectory = position.trajectory
    candidates = [
        stream
        for stream in trajectory.streams
        if not stream.busy
        and id(stream) not in taken
        and stream.context == content.context
        and stream.position is not position
        and position.descends_from(stream.position)
    ]
    candidates.sort(key=lambda stream: (stream.is_spare, -stream.call, stream.row))
    exact, moved = [], []
    for stream in candidates:
        others = differing(stream.conditions, content.conditions)
        trajectory.learn(position.step, content.conditions, others)
        if not others:
            exact.append(stream)
        elif all(map(trajectory.moves, others)):
            moved.append(stream)
    if exact:
        return exact[0]
    if trajectory.is_parted_by_what_moves or len({id(stream.position) for stream in moved}) < len(moved):
        return None
    return max(moved, key=lambda stream: stream.position.step, default=None)


def was_called_here(position: Position, content: Content) -> bool:
    """Whether the same call was made before: a host tries again, or two requests are the same."""
    return any(stream.position is position and content.belongs_to(stream) for stream in position.trajectory.streams)
