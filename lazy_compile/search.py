"""The best schedule near a given one, and its slopes, by the first-order model of a response."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lazy_compile.response import MAX_AGE, Response
from lazy_compile.schedule import BoolTable, CacheSchedule

Floats = npt.NDArray[np.float64]


def predicted_error(response: Response, schedule: CacheSchedule) -> float:
    """Mean squared change of the final samples, against dense ones, that ``schedule`` is expected to cause."""
    return float((_LinearModel.around(response).moved_to(schedule).error ** 2).mean()) / response.size


def fit_slopes(response: Response, schedule: CacheSchedule, ridge: float = 0.1) -> CacheSchedule:
    """The same decisions with better slopes, by least squares.

    Args:
        response: around a schedule that is near.
        schedule: the schedule whose slopes to change.
        ridge: what changing a slope costs, as a share of its own effect: large changes, of which the first-order model
            knows nothing, are not made for small gains.
    """
    model = _LinearModel.around(response).moved_to(schedule)
    places, columns = [], []
    for branch in range(schedule.branches):
        for step, (age, gap) in enumerate(_ages(schedule.should_compute[:, branch])):
            if gap and not schedule.should_compute[step, branch]:
                newest, before = response.answer[:, step, branch, [min(age, MAX_AGE), min(age + gap, MAX_AGE)]].T
                places.append((step, branch))
                columns.append((age / gap) * (newest.astype(np.float64) - before))
    slopes = model.slopes.copy()
    if places:
        design = np.stack(columns, axis=1)
        gram = design.T @ design
        strength = np.diag(gram)
        gram += np.diag(ridge * strength + 1e-4 * strength.mean() + np.finfo(float).tiny)
        slopes[tuple(np.array(places).T)] -= np.linalg.solve(gram, design.T @ model.error)
    return CacheSchedule(schedule.should_compute, slopes)


def swap(
    response: Response, start: CacheSchedule, cost: Floats, spend: float, swaps: int, *, warmup_steps: int = 1
) -> CacheSchedule:
    """Exchange computations for reuse, pair by pair, while the model expects less error.

    Args:
        response: around a schedule that is near.
        start: the schedule to improve; where it spends less than it may, branches compute more.
        cost: ``float64[G]``, of computing each branch once.
        spend: what may be spent in all.
        swaps: at most this many pairs; far from where it was measured the model is wrong.
        warmup_steps: the first steps, which compute whatever happens.
    """
    model = _LinearModel.around(response).moved_to(start)
    for _ in range(swaps):
        better = model.best_exchange(cost, spend, warmup_steps)
        if better is None:
            break
        model = better
    return model.schedule


@dataclass(frozen=True)
class _LinearModel:
    """A schedule, and the error along each direction that it is expected to have.

    Attributes:
        answer: of the response.
        table, slopes: the schedule.
        error: ``float64[N]``.
        flips: ``float64[T, G, N]``, what turning one decision over adds to the error.
    """

    answer: npt.NDArray[np.float32]
    table: BoolTable
    slopes: Floats
    error: Floats
    flips: Floats | None = None

    @classmethod
    def around(cls, response: Response) -> _LinearModel:
        schedule = response.schedule
        slopes = np.ones(schedule.should_compute.shape) if schedule.slopes is None else schedule.slopes
        return cls(response.answer, schedule.should_compute, slopes, response.error)

    @property
    def schedule(self) -> CacheSchedule:
        return CacheSchedule(self.table, self.slopes)

    def moved_to(self, schedule: CacheSchedule) -> _LinearModel:
        slopes = self.slopes if schedule.slopes is None else schedule.slopes
        error = self.error.copy()
        for branch in range(self.table.shape[1]):
            before = _weights(self.table[:, branch], self.slopes[:, branch])
            after = _weights(schedule.should_compute[:, branch], slopes[:, branch])
            error += self._effect(branch, after - before)
        return replace(self, table=schedule.should_compute, slopes=slopes, error=error, flips=None)

    def best_exchange(self, cost: Floats, spend: float, first: int) -> _LinearModel | None:
        """The best of all pairs (computes no more, computes now) that keep to the budget; or one that computes now."""
        flips = self.flips if self.flips is not None else self._all_flips()
        effects = flips[first:].reshape(-1, flips.shape[2])
        gram = effects @ effects.T
        change = 2 * effects @ self.error + np.diag(gram)
        computes = self.table[first:].ravel()
        price = np.tile(cost, len(self.table) - first)
        left = spend - float((self.table * cost).sum()) + 1e-12
        on, off = np.flatnonzero(computes), np.flatnonzero(~computes)
        if not len(off):
            return None
        pairs = change[on][:, None] + change[off][None, :] + 2 * gram[np.ix_(on, off)]
        pairs[price[off][None, :] - price[on][:, None] > left] = np.inf
        alone = np.where(price[off] <= left, change[off], np.inf)
        if len(on) and pairs.min() < alone.min():
            dropped, taken = np.unravel_index(int(pairs.argmin()), pairs.shape)
            chosen = [on[dropped], off[taken]]
        else:
            chosen = [off[int(alone.argmin())]]
        moved = self._turned([place + first * len(cost) for place in chosen], flips)
        return moved if (moved.error**2).sum() < (self.error**2).sum() * (1 - 1e-6) else None

    def _turned(self, chosen: list[int], flips: Floats) -> _LinearModel:
        table = self.table.copy()
        width = table.shape[1]
        for place in chosen:
            table[place // width, place % width] ^= True
        moved = self.moved_to(CacheSchedule(table, self.slopes))
        flips = flips.copy()
        for branch in {place % width for place in chosen}:
            flips[:, branch] = moved._flips_of(branch)
        return replace(moved, flips=flips)

    def _all_flips(self) -> Floats:
        return np.stack([self._flips_of(branch) for branch in range(self.table.shape[1])], axis=1)

    def _flips_of(self, branch: int) -> Floats:
        column, slopes = self.table[:, branch], self.slopes[:, branch]
        before = _weights(column, slopes)
        changes = [np.zeros_like(before)]
        for step in range(1, len(column)):
            turned = column.copy()
            turned[step] ^= True
            changes.append(_weights(turned, slopes) - before)
        return self._effect(branch, np.stack(changes))

    def _effect(self, branch: int, change: Floats) -> Floats:
        """``float64[..., N]`` of ``change: float64[..., T, MAX_AGE + 1]``."""
        answer = self.answer[:, :, branch].reshape(len(self.answer), -1)
        effect: Floats = change.reshape(*change.shape[:-2], -1) @ answer.T.astype(np.float64)
        return effect


def _ages(column: BoolTable) -> list[tuple[int, int]]:
    """At each step, how old the last computation is, and how many steps lie between the last two; 0 without two."""
    latest, before, result = 0, None, [(0, 0)]
    for step in range(1, len(column)):
        result.append((step - latest, 0 if before is None else latest - before))
        if column[step]:
            latest, before = step, latest
    return result


def _weights(column: BoolTable, slopes: Floats) -> Floats:
    """``float64[T, MAX_AGE + 1]``: what a branch returns at each step, in terms of what it computed at earlier ones."""
    weights = np.zeros((len(column), MAX_AGE + 1))
    for step, (age, gap) in enumerate(_ages(column)):
        if step == 0 or column[step]:
            weights[step, 0] = 1.0
            continue
        moved = slopes[step] * age / gap if gap else 0.0
        weights[step, min(age, MAX_AGE)] += 1.0 + moved
        weights[step, min(age + gap, MAX_AGE)] -= moved
    return weights
