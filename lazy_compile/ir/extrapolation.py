"""Extrapolating reuse in a program without hidden state, as formulas over ATen operators.

Order n extrapolates from the last n + 1 values that a branch computed: 0 repeats the last one (``reuse="last"``), 1 is
linear, more is ``reuse="taylor"``, along the polynomial through the values, its terms beyond the line damped by
:data:`DAMPING`. A branch keeps ``cache``, its last value carried forward to the last step, and n differences:
``delta``, of its last two computed values, ``delta2``, of the two before, and so on. To reuse is to move the cache on
by parts of the differences: the result is at once what is reused and the next cache, so that little is written. To
compute renews the first difference and passes the others on.

Time is kept for all G branches together, in vectors ``float32[G]`` named by :func:`clock_names`:

- ``age``: steps since a branch computed, infinite before the first time;
- ``gap``, ``gap2``, ...: steps between its last two computations, between the two before, ...; infinite if there were
  none. The order is lower until there are enough;
- ``moved``, ``moved2``, ...: how many of each difference the cache was moved since it was computed.

``slope: float32[G]`` comes in at every step: how far a branch is extrapolated. 1 is all the way, 0 repeats the last
value. Differences are void while their gap is infinite, but must be finite: slots of zeros are a good start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from lazy_compile.config import MAX_ORDER

aten = torch.ops.aten

DAMPING = 0.5
"""Of the terms of extrapolation, from each order to the next: higher orders amplify what is no polynomial."""

SLOPE = "slope"
"""The input that says how far each branch is extrapolated: ``float32[G]``."""


def difference_names(kind: str, order: int) -> list[str]:
    """``kind``, ``kind2``, ... up to an order."""
    return [kind if number == 1 else f"{kind}{number}" for number in range(1, order + 1)]


def clock_names(order: int) -> tuple[str, ...]:
    """The slots that keep time."""
    return ("age", *difference_names("gap", order), *difference_names("moved", order)) if order else ()


CLOCK = {name: 0.0 if name.startswith("moved") else math.inf for name in clock_names(MAX_ORDER)}
"""Whatever keeps time, and what it starts from."""


def read_clock(order: int, clock: Sequence[Any], slope: Any) -> tuple[Any, ...]:
    """``float32[G]`` for each difference: by how many of it a cache is moved on if it is reused now."""
    moved = clock[1 + order :]
    return tuple(aten.sub.Tensor(*pair) for pair in zip(_targets(order, clock, slope), moved, strict=True))


def advance_clock(order: int, computes: Any, clock: Sequence[Any], slope: Any) -> tuple[Any, ...]:
    """The clock behind a step in which ``computes: bool[G]`` computed."""
    age, *gaps = clock[: 1 + order]
    older = aten.add.Tensor(age, 1.0)
    return (
        aten.where.ScalarSelf(computes, 0.0, older),
        *(aten.where.self(computes, before, gap) for before, gap in zip([older, *gaps], gaps, strict=False)),
        *(aten.where.ScalarSelf(computes, 0.0, target) for target in _targets(order, clock, slope)),
    )


def moved_on(cache: Any, differences: Sequence[Any], shifts: Sequence[Any], dtype: torch.dtype) -> Any:
    """``cache + shift * delta + ...``: what is reused, and the next cache."""
    for difference, shift in zip(differences, shifts, strict=True):
        cache = aten.add.Tensor(cache, aten.mul.Tensor(difference, _cast(shift, dtype)))
    return cache


def new_difference(value: Any, cache: Any, differences: Sequence[Any], moved: Sequence[Any], dtype: torch.dtype) -> Any:
    """``value - (cache - moved * delta - ...)``: of what a branch computes now and computed before."""
    for difference, number in zip(differences, moved, strict=True):
        cache = aten.sub.Tensor(cache, aten.mul.Tensor(difference, _cast(number, dtype)))
    return aten.sub.Tensor(value, cache)


def _targets(order: int, clock: Sequence[Any], slope: Any) -> list[Any]:
    """By how many of each difference the cache of each branch is to be moved at this step.

    Of the highest order for which there is a value that long ago: the gap to one that there is not is infinite.
    """
    age, *gaps = clock[: 1 + order]
    since = aten.add.Tensor(age, 1.0)
    found: list[Any] = []
    for degree in range(1, order + 1):
        shares = _shares(since, gaps[:degree])
        there = aten.lt.Scalar(gaps[degree - 1], math.inf)
        found = [
            aten.where.self(there, share, lower) if lower is not None else aten.where.ScalarOther(there, share, 0.0)
            for share, lower in zip(shares, [*found, None], strict=True)
        ]
    return [aten.mul.Tensor(share, slope) for share in found]


def _shares(since: Any, gaps: Sequence[Any]) -> list[Any]:
    """How many of each difference lead from the last value to where it is extrapolated, ``since`` steps later.

    Newton's divided differences, each held as its parts of the plain differences: those of the first order are a
    difference over its gap, one of a higher order is the difference of two of the order below over all their gaps.
    """
    rates = [{place: aten.reciprocal.default(gap)} for place, gap in enumerate(gaps)]
    spans, power = list(gaps), since
    shares = {0: aten.mul.Tensor(power, rates[0][0])}
    for order in range(2, len(gaps) + 1):
        ahead = aten.add.Tensor(since, spans[0])
        spans = [aten.add.Tensor(span, gap) for span, gap in zip(spans, gaps[order - 1 :], strict=False)]
        rates = [_rate(*pair, spans[place]) for place, pair in enumerate(itertools.pairwise(rates))]
        power = aten.mul.Tensor(aten.mul.Tensor(power, ahead), DAMPING)
        for place, part in rates[0].items():
            term = aten.mul.Tensor(power, part)
            shares[place] = aten.add.Tensor(shares[place], term) if place in shares else term
    return [shares[place] for place in range(len(gaps))]


def _rate(newer: dict[int, Any], older: dict[int, Any], span: Any) -> dict[int, Any]:
    """``(newer - older) / span``, part by part."""
    found = dict(newer)
    for place, part in older.items():
        found[place] = aten.sub.Tensor(found[place], part) if place in found else aten.neg.default(part)
    return {place: aten.div.Tensor(part, span) for place, part in found.items()}


def _cast(scalar: Any, dtype: torch.dtype) -> Any:
    return scalar if dtype == torch.float32 else aten._to_copy.default(scalar, dtype=dtype)
