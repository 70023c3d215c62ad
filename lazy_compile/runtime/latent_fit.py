"""How well the latents of a row follow from an earlier step, and how much of them does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from lazy_compile.runtime.fingerprint import LATENTS, Floats, unexplained
from lazy_compile.runtime.positions import HALF, PROPORTIONAL, REACH, SPARE, Position, Returned, is_at

EXACT = 2.5e-3
"""Share of the latents (of their squares) that may stay unexplained where a step is a sum of what was there before."""


CERTAIN = 1e-9
"""What numbers of single precision leave unexplained at most."""


FINE = 1e-7
"""What may stay unexplained before further steps are asked."""


RELATED = 0.75
"""The same where the sampler adds noise or clips. Latents of two requests leave about 1."""


MARGIN = 0.1
"""How much more the step of another request must leave unexplained where a sampler adds noise or clips."""


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


PART = 64
"""Numbers of a part of the latents that is looked at by itself."""


def unexplained_part(latents: Floats, position: Position) -> float:
    """The share of that part of the latents that follows least: one of several samples may have been replaced."""
    target, here = latents[:-1], position.latents
    if here is None or here.shape != latents.shape:
        return 1.0
    basis = np.stack([here[:-1], *_finite(position.returned, latents)[:4]], axis=1)
    rest = target - basis @ np.linalg.lstsq(basis, target, rcond=1e-9)[0]
    parts = zip(*(np.array_split(np.square(each), max(2, len(target) // PART)) for each in (rest, target)), strict=True)
    return max(float(left.sum() / max(whole.sum(), np.finfo(np.float64).tiny)) for left, whole in parts)


def _finite(returned: Sequence[Returned], latents: Floats) -> list[Floats]:
    """What was returned in the shape of the latents, and is finite; each once, since calls may be made again."""
    found: dict[bytes, Floats] = {}
    for item in returned:
        values = item.values.get(LATENTS)
        if _is_like(values, latents) and np.isfinite(values).all():
            found.setdefault(values[:-1].tobytes(), values[:-1])
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
