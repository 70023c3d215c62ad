"""Which step of which trajectory a row of a call makes, and which stream it continues, by what the row holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lazy_compile.runtime.fingerprint import Floats
from lazy_compile.runtime.latent_fit import (
    EXACT,
    RELATED,
    Fit,
    is_ambiguous,
    level_of,
    unexplained_part,
    unexplained_share,
)
from lazy_compile.runtime.positions import (
    HALF,
    Doubt,
    Position,
    Stream,
    Trajectory,
    away,
    is_at,
    next_position,
    spot_of,
    starts_over,
    turns_back,
)


@dataclass(frozen=True, eq=False)
class Content:
    """What a row of a call holds.

    Attributes:
        latents: sampled; None if the model has none, or on the meta device.
        time: the time input; None if the model has none.
        conditions, context: as in :class:`~lazy_compile.runtime.positions.Stream`.
        is_joint: whether the latents are those of several samples together.
    """

    latents: Floats | None
    time: float | None
    conditions: Mapping[str, Floats]
    context: object
    is_joint: bool = False

    @property
    def spot(self) -> object:
        """What rows have in common that are called at the same position."""
        return spot_of(self.latents, self.time)

    def is_at(self, position: Position) -> bool:
        return is_at(position, self.latents, self.time)

    def belongs_to(self, stream: Stream) -> bool:
        """Whether the conditions of a stream are those of this row, less what moves from step to step."""
        if stream.context != self.context:
            return False
        return all(map(stream.position.trajectory.moves, stream.differs_by(self.conditions)))


class Leaves:
    """Where the streams of all trajectories stand that the host says nothing of.

    Attributes:
        streams: those of the trajectory that was continued last first.
        positions: each once.
        times: of all of them.
    """

    def __init__(self, alive: Sequence[Trajectory]) -> None:
        latest = sorted(alive, key=lambda trajectory: -trajectory.last_call)
        self.streams = [stream for trajectory in latest if trajectory.key is None for stream in trajectory.streams]
        self.positions = list({id(stream.position): stream.position for stream in self.streams}.values())
        self.times = {position.time for position in self.positions}
        self._at: dict[object, list[Position]] = {}
        for position in self.positions:
            self._at.setdefault(spot_of(position.latents, position.time), []).append(position)
        self._in_row: dict[int, list[Stream]] = {}
        for stream in self.streams:
            self._in_row.setdefault(stream.row, []).append(stream)

    def at(self, content: Content) -> list[Position]:
        """Those that a row is called at again."""
        return [position for position in self._at.get(content.spot, ()) if content.is_at(position)]

    def expected(self, content: Content, row: int) -> list[Position]:
        """Those of streams that stood in this row of a call, and have the conditions of the row."""
        return [stream.position for stream in self._in_row.get(row, ()) if content.belongs_to(stream)]

    def distance(self, time: float | None) -> float:
        """How near in time the nearest is."""
        none_told = time is None or None in self.times
        return 0.0 if none_told else min(abs(each - time) for each in self.times)  # type: ignore[operator]


def find_position(
    content: Content, leaves: Leaves, here: Collection[Position], row: int
) -> tuple[Position | None, Doubt | None]:
    """Where a row stands: at the position of an earlier call, or one step behind it; None if it continues nothing.

    Of a row that continues nothing, what it may follow if its sampler adds noise: only the steps to come can show that.

    A stream that waits to be continued comes first: one that has not been called at this position yet, or one at the
    position that the latents follow from. Then come a new stream of a position, and a call that is made again.

    Args:
        here: where other rows of the call stand that have its :attr:`~Content.spot`.
        row: which row of the call this is: most stay in their place, so that what stood there is looked at first.
    """
    for position in here:
        if content.is_at(position):
            return position, None
    at, expected = leaves.at(content), leaves.expected(content, row)
    if not at and expected and (certain := _certainly_before(content, expected, leaves)) is not None:
        return next_position(certain, content.latents, content.time, 0.0), None
    own = [stream for stream in leaves.streams if content.belongs_to(stream)]
    for position in at:
        if any(stream.position is not position and position.descends_from(stream.position) for stream in own):
            return position, None
    fit, before = _find_before(content, leaves.positions, own)
    share = 0.0 if fit is None else fit.unexplained
    following = None if before is None else next_position(before, content.latents, content.time, share)
    doubtful = fit is not None and fit.is_doubtful
    if fit is not None and not fit.is_new and not fit.is_only_related and not doubtful:
        return following, None
    for position in at:
        if all(stream.position is not position for stream in own):
            return position, None
    if at and not (before is not None and _is_same_step(at[0].parent, before)):
        return at[0], None
    if fit is not None and before is not None and doubtful:
        return None, None if fit.turns_back else Doubt(
            before.step + before.steps_before(), fit.unexplained, before.trajectory.lineage
        )
    return following, None


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
    fits: list[tuple[Fit, Position]] = []
    certain: Trajectory | None = None
    for position in sorted(leaves, key=lambda item: (*flags[id(item)], away(item, time))):
        if certain is not None and position.trajectory is not certain:
            continue
        fit = fit_of(content, position, *flags[id(position)])
        if fit is None:
            continue
        fits.append((fit, position))
        if fit.is_proof:
            break
        if fit.level == 0:
            certain = position.trajectory
    best = min(fits, key=lambda item: item[0], default=None)
    return (None, None) if best is None or is_ambiguous(*best, fits) else best


def _certainly_before(content: Content, expected: Sequence[Position], leaves: Leaves) -> Position | None:
    """The one of the expected positions, which streams of the row's conditions lead to, that :func:`_find_before` would
    take without a look at any other; None if it might take another."""
    time = content.time
    if content.latents is None or not np.isfinite(content.latents).all():
        return None
    position = min(expected, key=lambda item: (turns_back(item, time), away(item, time)))
    if turns_back(position, time) or away(position, time) > leaves.distance(time):
        return None
    fit = fit_of(content, position, is_new=False, turns=False)
    return position if fit is not None and fit.is_proof else None


def fit_of(content: Content, position: Position, is_new: bool, turns: bool) -> Fit | None:
    """How well a row follows from a position; None if it does not.

    Args:
        is_new: no stream of the row's conditions leads there.
        turns: time turns back from there.
    """
    latents, time, parent = content.latents, content.time, position.parent
    assert latents is not None
    if position.latents is None or content.is_at(position) or (parent is not None and content.is_at(parent)):
        return None
    begins = position.trajectory.begins_with
    if starts_over(position, time) or (begins(latents) and not begins(position.latents)):
        return None
    rest, is_indirect, regressors = unexplained_share(latents, position)
    related = rest > EXACT
    if related and content.is_joint:
        rest = max(rest, unexplained_part(latents, position))
    doubtful = not position.believes(rest, time)
    doubtful |= turns and (is_indirect or rest > HALF)
    distance = 0.0 if related else away(position, time)
    rests = related and position.time == time
    may_turn = turns or (parent is None and position.doubt is None)
    closeness = int(np.floor(np.log2(rest) / 2)) if related else 0
    fit = Fit(level_of(rest), is_indirect, is_new, turns, closeness, may_turn, rests, distance, rest, doubtful)
    most = max(EXACT, RELATED - 4 * np.sqrt(2 * regressors) / max(len(latents) - 1, 1))
    return fit if rest <= most and fit.is_acceptable else None


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
        others = stream.differs_by(content.conditions)
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
