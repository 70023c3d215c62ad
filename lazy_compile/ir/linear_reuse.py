"""Linear reuse in a program without hidden state, as formulas over ATen operators.

A branch keeps ``cache``, its output carried forward to the last step, and ``delta``, the difference of its last two
computed outputs. To reuse is to move the cache on by a part of delta: the result is at once the output and the next
cache, so that little is written. Time is kept for all G branches together, in vectors named by :data:`CLOCK`:

- ``age: float32[G]``, steps since a branch computed, infinite before the first time;
- ``gap: float32[G]``, steps between its last two computations, infinite before the second;
- ``moved: float32[G]``, how many deltas the cache was moved since it was computed.

``slope: float32[G]`` comes in at every step: how far a branch follows the line through its last two computed outputs.
1 is linear extrapolation, 0 repeats the last output.

While gap is infinite nothing moves: delta is void then, but must be finite. Slots of zeros are a good start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten

CLOCK = {"age": math.inf, "gap": math.inf, "moved": 0.0}
"""The slots that keep time, and what they start from."""

SLOPE = "slope"
"""The input that says how far each branch follows its line: ``float32[G]``."""

SCALARS = ("shift", "moved")
"""What a branch needs of the clock: by how many deltas its cache moves if it is reused now, and by how many it was
moved before."""


def read_clock(age: Any, gap: Any, moved: Any, slope: Any) -> Any:
    """``shift: float32[G]``, which follows the line through the last two computed values to this step."""
    return aten.sub.Tensor(_target(age, gap, slope), moved)


def advance_clock(computes: Any, age: Any, gap: Any, moved: Any, slope: Any) -> tuple[Any, Any, Any]:
    """The clock behind a step in which ``computes: bool[G]`` computed."""
    older = aten.add.Tensor(age, 1.0)
    return (
        aten.where.ScalarSelf(computes, 0.0, older),
        aten.where.self(computes, older, gap),
        aten.where.ScalarSelf(computes, 0.0, _target(age, gap, slope)),
    )


def moved_on(
    scalars: Sequence[Any], caches: Sequence[Any], deltas: Sequence[Any], dtypes: Sequence[torch.dtype]
) -> tuple[Any, ...]:
    """``cache + shift * delta``: outputs of a branch that is reused, and its next caches."""
    shift, _ = scalars
    return tuple(
        aten.add.Tensor(cache, aten.mul.Tensor(delta, _cast(shift, dtype)))
        for cache, delta, dtype in zip(caches, deltas, dtypes, strict=True)
    )


def new_deltas(
    scalars: Sequence[Any],
    caches: Sequence[Any],
    deltas: Sequence[Any],
    outputs: Sequence[Any],
    dtypes: Sequence[torch.dtype],
) -> tuple[Any, ...]:
    """``output - (cache - moved * delta)``: the difference of what a branch computes now and computed before."""
    _, moved = scalars
    return tuple(
        aten.sub.Tensor(output, aten.sub.Tensor(cache, aten.mul.Tensor(delta, _cast(moved, dtype))))
        for cache, delta, output, dtype in zip(caches, deltas, outputs, dtypes, strict=True)
    )


def _target(age: Any, gap: Any, slope: Any) -> Any:
    """By how many deltas the cache of each branch is to be moved at this step; none while gap is infinite."""
    deltas = aten.mul.Tensor(aten.div.Tensor(aten.add.Tensor(age, 1.0), gap), slope)
    return aten.where.ScalarOther(aten.lt.Scalar(gap, math.inf), deltas, 0.0)


def _cast(scalar: Any, dtype: torch.dtype) -> Any:
    return scalar if dtype == torch.float32 else aten._to_copy.default(scalar, dtype=dtype)
