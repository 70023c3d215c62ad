"""Whether the rows of a batch can be computed apart: which axis holds them, and which operators mix them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.operators import value_of
from lazy_compile.program import Program, Role
from lazy_compile.row_places import Place, RowPlaces, RowsMix, involves


def batch_symbol(program: Program) -> str | None:
    """The symbolic size of the batch: axis 0 of the first output, if an input has it too. None if it is fixed."""
    outputs = [value_of(node) for node in program.graph.output_node().all_input_nodes]
    symbols = [_symbol(value.shape[0]) for value in outputs if isinstance(value, Tensor) and value.dim() > 0]
    first = symbols[0] if symbols else None
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        value = value_of(node)
        if (
            item.role is Role.USER
            and isinstance(value, Tensor)
            and value.dim() > 0
            and _symbol(value.shape[0]) == first
        ):
            return first
    return None


def batch_axis(value: Tensor, symbol: str | None) -> int | None:
    """The one axis whose size is the batch; None if there is none."""
    axes = [axis for axis, size in enumerate(value.shape) if symbol is not None and _symbol(size) == symbol]
    return axes[0] if len(axes) == 1 else None


def axis_of_size(tensor: fx.Node, size: fx.Node) -> int | None:
    """The axis of ``tensor`` whose length is the symbolic ``size``; None if no axis has it."""
    value, wanted = value_of(tensor), str(value_of(size))
    if not isinstance(value, Tensor):
        return None
    return next((axis for axis, length in enumerate(value.shape) if str(length) == wanted), None)


def why_rows_mix(
    body: Iterable[fx.Node],
    inputs: Sequence[fx.Node],
    entries: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    symbol: str | None,
) -> str:
    """Empty if every row of ``outputs`` depends only on the same row of ``inputs``; else the reason."""
    if symbol is None:
        return "the batch size is fixed in this graph"
    places: dict[fx.Node, Place] = {}
    for node in inputs:
        value = value_of(node)
        axis = batch_axis(value, symbol) if isinstance(value, Tensor) else None
        if axis is not None:
            places[node] = Place(axis)
        elif isinstance(value, Tensor) and involves(value.shape, symbol):
            return f"input {node.name} has its rows folded into another axis, {_describe(value.shape)}"
        elif node in entries:
            return f"entry {node.name} has no batch axis"
        elif isinstance(value, torch.SymInt) and involves([value], symbol) and not _measurable(node, inputs):
            return f"the size {value} is computed from the batch outside the branch"
    rows = RowPlaces(symbol, places)
    try:
        for node in body:
            rows.follow(node)
    except RowsMix as reason:
        return str(reason)
    for node in outputs:
        axis = batch_axis(value_of(node), symbol)
        if axis is None or rows.place(node) != Place(axis):
            return f"output {node.name} has no batch axis"
    return ""


def _measurable(size: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    return any(axis_of_size(node, size) is not None for node in inputs)


def _symbol(size: Any) -> str | None:
    return str(size) if isinstance(size, torch.SymInt) and str(size).isidentifier() else None


def _describe(sizes: Iterable[Any]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"
