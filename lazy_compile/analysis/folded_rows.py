"""Rows that share an axis with something else, one row's part after another: windows, or frames, folded into the batch.

Such an axis is taken apart at the border of a branch, so that its rows can be picked there: ``[B * windows, N, C]``
enters and leaves as ``[B, windows, N, C]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from lazy_compile.analysis.row_places import Place, RowPlaces, RowsMix, involves
from lazy_compile.analysis.row_propagation import follow
from lazy_compile.ir.operators import size_text, value_of

FOLDED = "rows_folded_at"
"""``node.meta[FOLDED]`` is the axis of a tensor that a branch reads or returns with its rows folded."""


def follow_folded_rows(graph: fx.Graph, symbol: str | None) -> Mapping[fx.Node, Place]:
    """Where tensors without an axis of the length of the batch hold their rows, as far as it could be followed."""
    if symbol is None:
        return {}
    rows = RowPlaces(symbol, {})
    for node in graph.nodes:
        value = value_of(node)
        axes = (
            [a for a, size in enumerate(value.shape) if size_text(size) == symbol] if isinstance(value, Tensor) else []
        )
        if len(axes) == 1:
            rows.put(node, Place(axes[0]))
        elif node.op == "call_function" and not axes:
            try:
                follow(rows, node)
            except RowsMix:
                continue
    return {node: place for node, place in rows.items() if is_folded(node, place, symbol)}


def is_folded(node: fx.Node, place: Place | None, symbol: str) -> bool:
    """Whether an axis holds the rows one after another, each with as many positions as the others."""
    value = value_of(node)
    if place is None or place.outer != 1 or not isinstance(value, Tensor):
        return False
    size = value.shape[place.axis]
    return size_text(size) != symbol and involves([size], symbol)


def unfolded(node: fx.Node, axis: int | None, rows: torch.SymInt | None) -> Tensor:
    """The recorded value of a node, with this axis taken apart into rows and the rest."""
    value: Tensor = value_of(node)
    if axis is None or rows is None:
        return value
    sizes = [*value.shape[:axis], rows, value.shape[axis] // rows, *value.shape[axis + 1 :]]
    with value.fake_mode:  # type: ignore[attr-defined]
        return value.new_empty(sizes)


def insert_unfold(graph: fx.Graph, node: fx.Node, axis: int, value: Tensor, sources: Sequence[fx.Node]) -> fx.Node:
    """``node`` with an axis taken apart, recorded as ``value``; one of the ``sources`` has a line for each row."""
    rest = value.shape[axis + 1]
    if isinstance(rest, int):
        sizes: list[int | fx.Node] = [-1, rest]
    else:
        sizes = [_length(graph, value.shape[axis], sources), -1]
    result = graph.call_function(torch.ops.aten.unflatten.int, (node, axis, sizes))
    result.meta = {"val": value}
    return result


def insert_fold(graph: fx.Graph, node: fx.Node, axis: int, value: Tensor) -> fx.Node:
    """The opposite: two axes made one."""
    result = graph.call_function(torch.ops.aten.flatten.using_ints, (node, axis, axis + 1))
    result.meta = {"val": value}
    return result


def _length(graph: fx.Graph, rows: torch.SymInt, sources: Sequence[fx.Node]) -> fx.Node:
    places = (
        (node, axis)
        for node in sources
        if isinstance(value_of(node), Tensor)
        for axis, size in enumerate(value_of(node).shape)
        if size_text(size) == size_text(rows)
    )
    length = graph.call_function(torch.ops.aten.sym_size.int, next(places))
    length.meta = {"val": rows}
    return length
