"""Reuse along a polynomial in a program without hidden state, as formulas over ATen operators.

Order n follows the polynomial through the last n + 1 values that a branch computed: 0 repeats the last one
(``reuse="last"``), 1 is linear, more is ``reuse="taylor"``. A branch keeps ``cache``, its last value carried forward to
the last step, and n differences: ``delta``, of its last two computed values, ``delta2``, of the two before, and so on.
To reuse is to move the cache on by parts of the differences: the result is at once what is reused and the next cache,
so that little is written. To compute renews the first difference and passes the others on.

Time is kept for all G branches together, in vectors ``float32[G]`` named by :func:`clock_names`:

- ``age``: steps since a branch computed, infinite before the first time;
- ``gap``, ``gap2``, ...: steps between its last two computations, between the two before, ...; infinite if there were
  none. A polynomial of lower order is followed until there are enough;
- ``moved``, ``moved2``, ...: how many of each difference the cache was moved since it was computed.

``slope: float32[G]`` comes in at every step: how far a branch follows its polynomial. 1 is extrapolation, 0 repeats the
last value. Differences are void while their gap is infinite, but must be finite: slots of zeros are a good start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lazy_compile.config import MAX_ORDER

aten = torch.ops.aten

SLOPE = "slope"
"""The input that says how far each branch follows its polynomial: ``float32[G]``."""


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
    """How many of each difference lead from the last value to the polynomial ``since`` steps later.

    With values at 0, -gap, -gap - gap2, ... the polynomial is the sum of weight times value, by Lagrange; a value is
    the last one less the differences between.
    """
    if len(gaps) == 1:
        return [aten.div.Tensor(since, gaps[0])]
    back = [gaps[0]]
    for gap in gaps[1:]:
        back.append(aten.add.Tensor(back[-1], gap))
    shares: list[Any] = []
    total = None
    for place in reversed(range(len(back))):
        # Lagrange: (since - 0) / (-back - 0), then (since + other) / (other - back) for every other value
        weight = aten.div.Tensor(since, back[place])
        for other in back[:place] + back[place + 1 :]:
            numerator = aten.add.Tensor(since, other)
            weight = aten.mul.Tensor(weight, aten.div.Tensor(numerator, aten.sub.Tensor(other, back[place])))
        total = weight if total is None else aten.add.Tensor(total, weight)
        shares.insert(0, total)
    return shares


def _cast(scalar: Any, dtype: torch.dtype) -> Any:
    return scalar if dtype == torch.float32 else aten._to_copy.default(scalar, dtype=dtype)
