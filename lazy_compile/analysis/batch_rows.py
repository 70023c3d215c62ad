"""Whether the rows of a batch can be computed apart: which axis holds them, and which operators mix them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.folded_rows import is_folded
from lazy_compile.analysis.row_places import Place, RowPlaces, RowsMix, involves
from lazy_compile.analysis.row_propagation import follow
from lazy_compile.ir.operators import NUMBERS, SDPA, SOFTMAX, VIEWS, operator_name, size_text, value_of
from lazy_compile.ir.program import Program, Role


def batch_rows(program: Program) -> torch.SymInt | None:
    """The symbolic size of the batch: axis 0 of the first output, if an input has it too. None if it is fixed."""
    size = batch_size(program)
    source = batch_source(program, size)
    return None if source is None else value_of(source).shape[0]


def batch_source(program: Program, symbol: str) -> fx.Node | None:
    """An input of the user that has one line for each row of the batch."""
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        value = value_of(node)
        if item.role is Role.USER and isinstance(value, Tensor) and value.dim() and _symbol(value.shape[0]) == symbol:
            return node
    return None


def batch_size(program: Program) -> str:
    """How the size of the batch reads, axis 0 of the first output: a symbol, or a number where it is fixed.

    It is 1 where that axis holds tokens: the output has no other axis for them, and an attention sums over its length,
    or that of several such tensors together.
    """
    outputs = [value_of(node) for node in program.graph.output_node().all_input_nodes]
    first = next((value for value in outputs if isinstance(value, Tensor) and value.dim() > 0), None)
    if first is None:
        return "1"
    size = size_text(first.shape[0])
    lengths = (_attended(node) for node in program.graph.nodes)
    packed = first.dim() == 2 and any(size in re.findall(r"\w+", length) for length in lengths)
    return "1" if packed else size


def _attended(node: fx.Node) -> str:
    """The length that a softmax adds up to one over; empty for another operator."""
    if operator_name(node) in SDPA:
        return size_text(value_of(node.args[1]).shape[-2])  # type: ignore[arg-type]
    if operator_name(node) in SOFTMAX and isinstance(axis := node.args[1], int):
        return size_text(value_of(node).shape[axis])
    return ""


def batch_symbol(program: Program) -> str | None:
    """The name of :func:`batch_rows`."""
    rows = batch_rows(program)
    return None if rows is None else size_text(rows)


def batch_axis(value: Tensor, symbol: str | None) -> int | None:
    """The one axis whose size is the batch; None if there is none."""
    axes = [axis for axis, size in enumerate(value.shape) if symbol is not None and _symbol(size) == symbol]
    return axes[0] if len(axes) == 1 else None


def axis_of_size(tensor: fx.Node, size: fx.Node) -> int | None:
    """The axis of ``tensor`` whose length is the symbolic ``size``; None if no axis has it."""
    value, wanted = value_of(tensor), size_text(value_of(size))
    if not isinstance(value, Tensor):
        return None
    return next((axis for axis, length in enumerate(value.shape) if size_text(length) == wanted), None)


def is_measurable(size: fx.Node, tensors: Sequence[fx.Node], symbol: str | None = None) -> bool:
    """Whether a size is the length of an axis of ``tensors``, or ``symbol``, or computed from such sizes."""
    if size_text(value_of(size)) == symbol or any(axis_of_size(tensor, size) is not None for tensor in tensors):
        return True
    operands = size.all_input_nodes
    return bool(operands) and all(
        isinstance(value_of(operand), NUMBERS) and is_measurable(operand, tensors, symbol) for operand in operands
    )


def follow_rows(
    body: Iterable[fx.Node],
    inputs: Sequence[fx.Node],
    entries: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    symbol: str | None,
    folded: Mapping[fx.Node, Place],
) -> tuple[str, dict[fx.Node, int]]:
    """Whether every row of ``outputs`` depends only on the same row of ``inputs``.

    Returns:
        The reason why not, empty if so; and which inputs and outputs have their rows folded into which axis.
    """
    if symbol is None:
        return "the batch size is fixed in this graph", {}
    places: dict[fx.Node, Place] = {}
    axes: dict[fx.Node, int] = {}
    for node in inputs:
        value = value_of(node)
        axis = batch_axis(value, symbol) if isinstance(value, Tensor) else None
        if axis is not None:
            places[node] = Place(axis)
        elif node in folded:
            places[node] = folded[node]
            axes[node] = folded[node].axis
        elif isinstance(value, Tensor) and involves(value.shape, symbol):
            return f"input {node.name} has its rows folded into another axis, {_describe(value.shape)}", {}
        elif node in entries:
            return f"entry {node.name} has no batch axis", {}
    for node in inputs:
        value = value_of(node)
        if involves([value], symbol) and not is_measurable(node, inputs, symbol if axes else None):
            return f"the size {value} is computed from the batch outside the branch", {}
    rows = RowPlaces(symbol, places)
    try:
        for node in body:
            follow(rows, node)
    except RowsMix as reason:
        return str(reason), {}
    for node in outputs:
        place, axis = rows.place(node), batch_axis(value_of(node), symbol)
        if axis is None and place is not None and is_folded(node, place, symbol):
            axes[node] = place.axis
        elif axis is None or place != Place(axis):
            return f"output {node.name} has no batch axis", {}
    return "", axes


def unfolding_views(flow: Dataflow, body: int, batch_symbol: str | None) -> int:
    """Views behind a body that take apart an axis in which its output has rows and tokens folded together."""
    views = 0
    for output in flow.members(body):
        chain = 0
        while _is_folded(value_of(output), batch_symbol):
            (user,) = output.users if len(output.users) == 1 else (None,)
            if user is None or operator_name(user) not in VIEWS:
                chain = 0
                break
            chain |= 1 << flow.position[user]
            output = user
        views |= chain
    return views


def _is_folded(value: object, batch_symbol: str | None) -> bool:
    return (
        isinstance(value, Tensor)
        and batch_symbol is not None
        and involves(value.shape, batch_symbol)
        and batch_axis(value, batch_symbol) is None
    )


def _symbol(size: Any) -> str | None:
    return text if isinstance(size, torch.SymInt) and (text := size_text(size)).isidentifier() else None


def _describe(sizes: Iterable[Any]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"
