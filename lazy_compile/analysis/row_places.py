"""Where the tensors of a graph hold the rows of the batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from lazy_compile.ir.operators import (
    NUMBERS,
    exact,
    symbols_of,
    value_of,
)

BATCH = 1_000_003
"""The number that stands for the size of the batch where it is read what a size was multiplied from."""


@dataclass(frozen=True)
class Place:
    """Where a tensor holds its rows: the index along ``axis`` is (block, row, offset), with ``outer`` blocks.

    Sizes are counted as if each symbolic one had the value that :meth:`RowPlaces.sizes` gives it.
    """

    axis: int
    outer: int = 1


def involves(sizes: Iterable[Any], symbol: str) -> bool:
    """Whether a number is, or is computed from, the symbolic size ``symbol``."""
    return any(isinstance(size, NUMBERS) and symbol in symbols_of(size.node.expr) for size in sizes)


class RowsMix(Exception):
    """An operator reads more than one row to make one; the message names it."""


class RowPlaces:
    """The place of the rows in each node that was followed; none where all rows share a value.

    Args:
        symbol: the symbolic batch size.
        places: of the nodes that are read from outside.
        length: how many rows there are, as :meth:`sizes` counts; for rows that are no batch, such as tokens.
    """

    def __init__(self, symbol: str, places: dict[fx.Node, Place], length: int = BATCH) -> None:
        self.symbol, self.length = symbol, length
        self._places = dict(places)
        self._primes: dict[str, int] = {}
        self._lengths: dict[Any, int] = {}

    def place(self, node: fx.Node) -> Place | None:
        return self._places.get(node)

    def put(self, node: fx.Node, place: Place) -> None:
        self._places[node] = place

    def items(self) -> Iterable[tuple[fx.Node, Place]]:
        return self._places.items()

    def sizes(self, node: fx.Node) -> list[int]:
        """A shape in numbers from which it can be read what a size was multiplied from.

        The batch is one large prime; every other symbol is another, times the factors that sizes are divided by.

        Raises:
            RowsMix: a size is divided by another that large numbers make zero.
        """
        try:
            return [size if isinstance(size, int) else self._at_primes(size.node.expr) for size in value_of(node).shape]
        except ZeroDivisionError:
            raise RowsMix(f"a size of {node.name} is computed by division, so its rows cannot be told") from None

    def _at_primes(self, expression: Any) -> int:
        if expression not in self._lengths:
            self._lengths[expression] = int(exact(expression).subs(map(self._stand_in, expression.free_symbols)))
        return self._lengths[expression]

    def _stand_in(self, symbol: Any) -> tuple[Any, int]:
        if str(symbol) == self.symbol:
            return symbol, BATCH
        return symbol, _DIVISIBLE * self._primes.setdefault(str(symbol), _PRIMES[len(self._primes) % len(_PRIMES)])


_DIVISIBLE = 720_720
_PRIMES = (1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099, 1_000_117, 1_000_121, 1_000_133)
