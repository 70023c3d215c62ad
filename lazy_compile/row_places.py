"""Following the rows of a batch through a piece of graph, operator by operator.

An operator that is not known to keep rows apart counts as one that mixes them: a wrong "apart" would give a wrong
image, a wrong "mixed" costs a decision per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.operators import exact, operator_name, size_text, value_of
from lazy_compile.row_rules import BATCH, Place, involves, rule_of


class RowsMix(Exception):
    """An operator reads more than one row to make one; the message names it."""


class RowPlaces:
    """The place of the rows in each node that was followed; none where all rows share a value.

    Args:
        symbol: the symbolic batch size.
        places: of the nodes that are read from outside.
    """

    def __init__(self, symbol: str, places: dict[fx.Node, Place]) -> None:
        self.symbol = symbol
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

    def follow(self, node: fx.Node) -> None:
        """Find the place in the next node of the graph.

        Raises:
            RowsMix: it cannot be computed row by row.
        """
        value = value_of(node)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return
        operands = node.all_input_nodes[:1] if operator_name(node) == "type_as" else node.all_input_nodes
        batched = [operand for operand in operands if operand in self._places]
        if operator_name(node) in _FILLED and isinstance(value, Tensor):
            if involves((value_of(item) for item in node.args if isinstance(item, fx.Node)), self.symbol):
                raise RowsMix(f"{operator_name(node)} ({node.name}) is filled with a number that counts the rows")
            axes = [axis for axis, size in enumerate(value.shape) if size_text(size) == self.symbol]
            if len(axes) == 1:
                self._places[node] = Place(axes[0])
            return  # else one value everywhere: any rows are as good as others
        if not batched:
            if isinstance(value, Tensor) and involves(value.shape, self.symbol):
                self._places[node] = self._uniform(node, value)
            return
        place = self._through(node, batched)
        if place is None:
            raise RowsMix(f"{operator_name(node) or node.op} ({node.name}) works across the rows of the batch")
        self._places[node] = place

    def _uniform(self, node: fx.Node, value: Tensor) -> Place:
        axes = [axis for axis, size in enumerate(value.shape) if size_text(size) == self.symbol]
        if operator_name(node) not in _UNIFORM or len(axes) != 1:
            raise RowsMix(f"{operator_name(node)} ({node.name}) makes a value for each row of the batch")
        return Place(axes[0])

    def _through(self, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
        name = operator_name(node)
        if name == "getitem":
            return self._places[batched[0]]
        rule = rule_of(node)
        return None if rule is None else rule(self, node, batched)


_DIVISIBLE = 720_720
_PRIMES = (1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099, 1_000_117, 1_000_121, 1_000_133)
_FILLED = frozenset(
    {
        "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
        "full_like", "empty_like",
    }
)  # fmt: skip
_UNIFORM = frozenset({"expand", "repeat"})
