"""The best schedule near a given one, and its slopes, by the first-order model of a response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.planning.sample_response import Response
from lazy_compile.planning.trace import MAX_AGE, earlier_weights
from lazy_compile.policies.schedule import BoolTable, CacheSchedule

Floats = npt.NDArray[np.float64]
Groups = list[npt.NDArray[np.int64]]
"""Branches that decide together."""


def predicted_error(response: Response, schedule: CacheSchedule) -> float:
    """Mean squared change of the final samples, against dense ones, that ``schedule`` is expected to cause."""
    model = _LinearModel.around(replace(response, weight=None)).moved_to(schedule)
    return float((model.error**2).mean()) / response.size


def around_another(response: Response, schedule: CacheSchedule) -> Response:
    """What the response is expected to be around a schedule nearby."""
    moved = _LinearModel.around(replace(response, weight=None)).moved_to(schedule)
    return replace(response, schedule=moved.schedule, error=moved.error)


def flips_of(response: Response) -> Floats:
    """``float64[T, G, N]``: what turning one decision over adds to the error along each direction, by its weight."""
    model = _LinearModel.around(response)
    return np.stack([model._flips_of_one(branch) for branch in range(response.schedule.branches)], axis=1)


def harm_of_reuse(response: Response) -> Floats:
    """``float64[T, G]``: mean squared change of the final samples, more if this decision reuses than if it computes."""
    error = response.error * np.sqrt(response.weights)
    flips = flips_of(response)
    change = (2 * flips * error + flips**2).mean(axis=2) / response.size
    harm: Floats = np.where(response.schedule.should_compute, change, -change)
    return harm


def fit_slopes(
    response: Response, schedule: CacheSchedule, ridge: float = 0.1, leaders: Sequence[int] = ()
) -> CacheSchedule:
    """The same decisions with better slopes, by least squares.

    Args:
        response: around a schedule that is near.
        schedule: the schedule whose slopes to change.
        ridge: what changing a slope costs, as a share of its own effect: large changes, of which the first-order model
            knows nothing, are not made for small gains.
        leaders: for each branch the one whose slope it shares; empty if each has its own.
    """
    model = _LinearModel.around(response).moved_to(schedule)
    columns: dict[tuple[int, int], Floats] = {}
    for branch, leader in enumerate(leaders or range(schedule.branches)):
        for step, computed in enumerate(_computed(schedule.should_compute[:, branch], model.order)):
            if len(computed) > 1 and not schedule.should_compute[step, branch]:
                line = _line(step, computed)
                along: Floats = model.answer[:, step, branch].astype(np.float64) @ line
                columns[step, leader] = columns.get((step, leader), 0.0) + along
    slopes = model.slopes.copy()
    if columns:
        design = np.stack(list(columns.values()), axis=1)
        gram = design.T @ design
        strength = np.diag(gram)
        gram += np.diag(ridge * strength + 1e-4 * strength.mean() + np.finfo(float).tiny)
        slopes[tuple(np.array(list(columns)).T)] -= np.linalg.solve(gram, design.T @ model.error)
    return CacheSchedule(schedule.should_compute, slopes[:, list(leaders)] if leaders else slopes)


def swap(
    response: Response,
    start: CacheSchedule,
    cost: Floats,
    spend: float,
    swaps: int,
    *,
    leaders: Sequence[int] = (),
    warmup_steps: int = 1,
) -> CacheSchedule:
    """Exchange computations for reuse, pair by pair, while the model expects less error.

    Args:
        response: around a schedule that is near.
        start: the schedule to improve; where it spends less than it may, branches compute more.
        cost: ``float64[G]``, of computing each branch once.
        spend: what may be spent in all.
        swaps: at most this many pairs; far from where it was measured the model is wrong.
        leaders: for each branch the one that decides for it; empty if each decides for itself.
        warmup_steps: the first steps, which compute whatever happens.
    """
    groups = _groups(leaders or range(start.branches))
    model = _LinearModel.around(response).moved_to(start)
    for _ in range(swaps):
        better = model.best_exchange(groups, cost, spend, warmup_steps)
        if better is None:
            break
        model = better
    return model.schedule


def trim(
    response: Response, cost: Floats, spend: float, *, leaders: Sequence[int] = (), warmup_steps: int = 1
) -> CacheSchedule:
    """Reuse more around the schedule that was measured until it keeps to a budget: what harms least for what it saves.

    For the other arguments see :func:`swap`.

    Raises:
        ConfigError: the first steps alone cost more.
    """
    groups = _groups(leaders or range(response.schedule.branches))
    model = _LinearModel.around(response)
    if float(cost.sum()) * warmup_steps > spend:
        raise ConfigError("this budget cannot be met, since the first steps compute everything; ask for less reuse")
    while float((model.table * cost).sum()) > spend:
        model = model.least_harmful_reuse(groups, cost, warmup_steps)
    return model.schedule


def _groups(leaders: Sequence[int]) -> Groups:
    return [np.flatnonzero(np.equal(leaders, leader)) for leader in sorted(set(leaders))]


@dataclass(frozen=True)
class _LinearModel:
    """A schedule, and the error along each direction that it is expected to have.

    Attributes:
        answer: of the response, each direction times the root of its weight, like all that follows.
        table, slopes: the schedule.
        error: ``float64[N]``.
        order: of the extrapolation.
        flips: ``float64[T, groups, N]``, what turning one decision over adds to the error.
    """

    answer: npt.NDArray[np.float32]
    table: BoolTable
    slopes: Floats
    error: Floats
    order: int
    flips: Floats | None = None

    @classmethod
    def around(cls, response: Response) -> _LinearModel:
        schedule = response.schedule
        slopes = np.ones(schedule.should_compute.shape) if schedule.slopes is None else schedule.slopes
        scale = np.sqrt(response.weights)
        answer = response.directional_derivatives * scale[:, None, None, None].astype(np.float32)
        return cls(answer, schedule.should_compute, slopes, response.error * scale, response.order)

    @property
    def schedule(self) -> CacheSchedule:
        return CacheSchedule(self.table, self.slopes)

    def moved_to(self, schedule: CacheSchedule) -> _LinearModel:
        slopes = self.slopes if schedule.slopes is None else schedule.slopes
        error = self.error.copy()
        for branch in range(self.table.shape[1]):
            before = _weights(self.table[:, branch], self.slopes[:, branch], self.order)
            after = _weights(schedule.should_compute[:, branch], slopes[:, branch], self.order)
            error += self._effect(branch, after - before)
        return replace(self, table=schedule.should_compute, slopes=slopes, error=error, flips=None)

    def best_exchange(self, groups: Groups, cost: Floats, spend: float, first: int) -> _LinearModel | None:
        """The best of all pairs (computes no more, computes now) that keep to the budget; or one that computes now."""
        flips = self._flips_of_all(groups)
        effects = flips[first:].reshape(-1, flips.shape[2])
        gram = effects @ effects.T
        change = 2 * effects @ self.error + np.diag(gram)
        computes = self.table[first:, [group[0] for group in groups]].ravel()
        price = np.tile([cost[group].sum() for group in groups], len(self.table) - first)
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
        moved = self._turned([divmod(place + first * len(groups), len(groups)) for place in chosen], groups, flips)
        return moved if (moved.error**2).sum() < (self.error**2).sum() * (1 - 1e-6) else None

    def least_harmful_reuse(self, groups: Groups, cost: Floats, first: int) -> _LinearModel:
        """One decision less to compute: the one that adds least error for its cost."""
        flips = self._flips_of_all(groups)
        effects = flips[first:].reshape(-1, flips.shape[2])
        change = 2 * effects @ self.error + np.square(effects).sum(axis=1)
        price = np.tile([cost[group].sum() for group in groups], len(self.table) - first)
        computes = self.table[first:, [group[0] for group in groups]].ravel() & (price > 0)
        droppable = np.flatnonzero(computes)
        least = droppable[int((change[droppable] / price[droppable]).argmin())]
        step, group = divmod(int(least) + first * len(groups), len(groups))
        return self._turned([(step, group)], groups, flips)

    def _flips_of_all(self, groups: Groups) -> Floats:
        """``float64[T, groups, N]``, see :attr:`flips`."""
        return self.flips if self.flips is not None else np.stack([self._flips_of(group) for group in groups], axis=1)

    def _turned(self, chosen: list[tuple[int, int]], groups: Groups, flips: Floats) -> _LinearModel:
        table = self.table.copy()
        for step, group in chosen:
            table[step, groups[group]] ^= True
        moved = self.moved_to(CacheSchedule(table, self.slopes))
        flips = flips.copy()
        for _, group in chosen:
            flips[:, group] = moved._flips_of(groups[group])
        return replace(moved, flips=flips)

    def _flips_of(self, group: npt.NDArray[np.int64]) -> Floats:
        """``float64[T, N]``: what it adds to the error if these branches decide otherwise at a step."""
        flips: Floats = np.sum([self._flips_of_one(branch) for branch in group], axis=0)
        return flips

    def _flips_of_one(self, branch: int) -> Floats:
        column, slopes = self.table[:, branch], self.slopes[:, branch]
        before = _weights(column, slopes, self.order)
        changes = [np.zeros_like(before)]
        for step in range(1, len(column)):
            turned = column.copy()
            turned[step] ^= True
            changes.append(_weights(turned, slopes, self.order) - before)
        return self._effect(branch, np.stack(changes))

    def _effect(self, branch: int, change: Floats) -> Floats:
        """``float64[..., N]`` of ``change: float64[..., T, MAX_AGE + 1]``."""
        answer = self.answer[:, :, branch].reshape(len(self.answer), -1)
        effect: Floats = change.reshape(*change.shape[:-2], -1) @ answer.T.astype(np.float64)
        return effect


def _computed(column: BoolTable, order: int) -> Iterator[tuple[int, ...]]:
    """At each step the last ``order + 1`` steps that computed before it, latest first."""
    latest: tuple[int, ...] = ()
    for step, computes in enumerate(column):
        yield latest
        if computes or step == 0:
            latest = (step, *latest[:order])


@cache
def _line(step: int, computed: tuple[int, ...]) -> Floats:
    """``float64[MAX_AGE + 1]``: what extrapolating all the way adds to the last output, by age."""
    line = np.zeros(MAX_AGE + 1)
    ages = [min(step - at, MAX_AGE) for at in computed]
    for age, weight in zip(ages[1:], earlier_weights(step, computed), strict=True):
        line[age] += weight
        line[ages[0]] -= weight
    line.flags.writeable = False
    return line


def _weights(column: BoolTable, slopes: Floats, order: int) -> Floats:
    """``float64[T, MAX_AGE + 1]``: what a branch returns at each step, in terms of what it computed at earlier ones."""
    weights = np.zeros((len(column), MAX_AGE + 1))
    for step, computed in enumerate(_computed(column, order)):
        if step == 0 or column[step]:
            weights[step, 0] = 1.0
            continue
        weights[step, min(step - computed[0], MAX_AGE)] = 1.0
        if len(computed) > 1:
            weights[step] += slopes[step] * _line(step, computed)
    return weights
