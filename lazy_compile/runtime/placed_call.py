"""A call whose rows have found the trajectories and the caches that they continue."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.matching import Content
from lazy_compile.runtime.positions import Position, Stream


@dataclass(eq=False)
class Row:
    """A row of a call, placed: at a position, and as the continuation of a stream or of none."""

    position: Position
    stream: Stream | None
    content: Content
    has_caches: bool
    is_repeated: bool


@dataclass(eq=False)
class Placed:
    """A call placed in its trajectories.

    Attributes:
        state: the caches of its rows, as they are before the call.
        steps: ``int64[rows]``, which call of its trajectory each row makes.
        times, before: the time input of each row now and at the step before; None where there is none.
        is_unrelated: whether no row continues an earlier call.
    """

    state: CacheState
    steps: npt.NDArray[np.int64]
    times: tuple[float | None, ...]
    before: tuple[float | None, ...]
    is_unrelated: bool
    rows: list[Row]
    call: int
    context: object

    @property
    def step(self) -> int:
        return int(self.steps.max())

    @property
    def digest(self) -> int:
        """Of the steps of the rows, and of when what is cached was computed."""
        slots = sorted(self.state.slots.items())
        times = [(index, slot.computed_at.tolist(), slot.computed_before.tolist()) for index, slot in slots]
        return crc32(repr((self.steps.tolist(), times)).encode())
