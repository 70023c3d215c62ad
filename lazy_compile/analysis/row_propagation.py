"""Following the rows of a batch through a piece of graph, operator by operator.

An operator that is not known to keep rows apart counts as one that mixes them: a wrong "apart" would give a wrong
image, a wrong "mixed" costs a decision per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lazy_compile.analysis.row_places import Place, RowPlaces, RowsMix, involves
from lazy_compile.analysis.row_rules import rule_of
from lazy_compile.ir.operators import operator_name, size_text, value_of

_FILLED = frozenset(
    {
        "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
        "full_like", "empty_like",
    }
)  # fmt: skip
_UNIFORM = frozenset({"expand", "repeat"})


def follow(rows: RowPlaces, node: fx.Node) -> None:
    """Find the place in the next node of the graph.

    Raises:
        RowsMix: it cannot be computed row by row.
    """
    value = value_of(node)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return
    operands = node.all_input_nodes[:1] if operator_name(node) == "type_as" else node.all_input_nodes
    batched = [operand for operand in operands if rows.place(operand) is not None]
    if operator_name(node) in _FILLED and isinstance(value, Tensor):
        if involves((value_of(item) for item in node.args if isinstance(item, fx.Node)), rows.symbol):
            raise RowsMix(f"{operator_name(node)} ({node.name}) is filled with a number that counts the rows")
        axes = [axis for axis, size in enumerate(value.shape) if size_text(size) == rows.symbol]
        if len(axes) == 1:
            rows.put(node, Place(axes[0]))
        return  # else one value everywhere: any rows are as good as others
    if not batched:
        if isinstance(value, Tensor) and involves(value.shape, rows.symbol):
            rows.put(node, _uniform(rows, node, value))
        return
    place = _through(rows, node, batched)
    if place is None:
        raise RowsMix(f"{operator_name(node) or node.op} ({node.name}) works across the rows of the batch")
    rows.put(node, place)


def _uniform(rows: RowPlaces, node: fx.Node, value: Tensor) -> Place:
    axes = [axis for axis, size in enumerate(value.shape) if size_text(size) == rows.symbol]
    if operator_name(node) not in _UNIFORM or len(axes) != 1:
        raise RowsMix(f"{operator_name(node)} ({node.name}) makes a value for each row of the batch")
    return Place(axes[0])


def _through(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    name = operator_name(node)
    if name == "getitem":
        return rows.place(batched[0])
    rule = rule_of(node)
    return None if rule is None else rule(rows, node, batched)
