"""Whole steps that a search begins with: evenly spread, by how much the model changes, or after a warm-up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.bool_]
"""``bool[T]``, which steps compute."""

Rule = Callable[[int], Steps]
"""From a number of steps to those that compute: as many, or fewer."""

TINY = 1e-9
"""Decides what falls on a border."""

WARM_UPS = (2, 3, 4, 6, 8, 10)
"""First steps that compute before others are spread over the rest."""

INTERVALS = (2, 3, 4, 5)
"""Of rules that compute at every n-th step after a warm-up."""

RULES = 4 + 2 * len(WARM_UPS) + 4 * len(INTERVALS)
"""Most whole steps that are tried."""


def rules(steps: int, change: Floats) -> list[Rule]:
    """Ways to choose steps that compute.

    1. Spread evenly, or by how much the model changes, each computation as late or as early as can be.
    2. A warm-up, and the rest spread evenly in the same two ways: its last interval may be longer or shorter.
    3. Every n-th step after a warm-up (TaylorSeer, arXiv 2503.06923), the longest or the shortest that gives as many
       steps. The first interval is whole, or two steps, as diffusers counts.

    Args:
        steps: T, of a trajectory.
        change: ``float64[T - 1]``, how much the model changes at every step after the first.
    """
    change = np.nan_to_num(change, nan=0.0, posinf=change[np.isfinite(change)].max(initial=0.0))
    passed = np.append(0.0, np.cumsum(change)) / change.sum() if change.sum() > 0 else np.arange(steps) / (steps - 1)
    places = [np.arange(steps) / steps, passed * (steps - 1) / steps]
    found: list[Rule] = [_spread(each, late) for each in places for late in (True, False)]
    for warm_up in WARM_UPS:
        if warm_up < steps:
            found += [_warmed(warm_up, steps, late) for late in (True, False)]
    return [*found, *every_nth(steps)]


def every_nth(steps: int) -> list[Rule]:
    """The third of :func:`rules`: what needs no measurement, and is hard to beat."""
    return [
        _every(interval, first, steps, pick) for interval in INTERVALS for first in (interval, 2) for pick in (max, min)
    ]


def fitting(rule: Rule, count: int, warmup_steps: int) -> Steps | None:
    """What a rule chooses if at most ``count`` steps compute, the first ``warmup_steps`` among them; None: too many."""
    for asked in range(count, 0, -1):
        computes = rule(asked).copy()
        computes[:warmup_steps] = True
        if computes.sum() <= count:
            return computes
    return None


def _spread(places: Floats, late: bool) -> Rule:
    """Computations at equal distances of ``places: float64[T]``, which rise within 0 and 1."""
    moved = places + TINY if late else np.append(places[1:], 1.0) - TINY
    return lambda count: np.diff(np.floor(moved * count), prepend=-1) > 0


def _warmed(warm_up: int, steps: int, late: bool) -> Rule:
    rest = _spread(np.arange(steps - warm_up) / (steps - warm_up), late)

    def rule(count: int) -> Steps:
        if count <= warm_up:
            return np.arange(steps) < count
        return np.append(np.ones(warm_up, dtype=bool), rest(count - warm_up))

    return rule


def _every(interval: int, first: int, steps: int, pick: Callable[[list[int]], int]) -> Rule:
    """Every ``interval``-th step after a warm-up; the first comes ``first`` steps after it.

    ``pick`` chooses among the warm-ups that give as many steps as can be.
    """
    numbers = np.arange(steps)

    def with_warm_up(warm_up: int) -> Steps:
        since = numbers - (warm_up - 1) - first
        computes: Steps = (numbers < warm_up) | ((since >= 0) & (since % interval == 0))
        return computes

    def rule(count: int) -> Steps:
        totals = {warm_up: int(with_warm_up(warm_up).sum()) for warm_up in range(1, count + 1)}
        most = max((total for total in totals.values() if total <= count), default=0)
        return (
            with_warm_up(pick([warm_up for warm_up in totals if totals[warm_up] == most])) if most else numbers < count
        )

    return rule
