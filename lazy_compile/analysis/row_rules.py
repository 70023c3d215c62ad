"""What operators do to the rows of a batch: for each that keeps them apart, where they lie in its result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from lazy_compile.analysis.row_places import Place, RowPlaces, involves
from lazy_compile.ir.opaque import opaque_call
from lazy_compile.ir.operators import (
    CELLS,
    CONVOLUTIONS,
    SDPA,
    argument_of,
    einsum_axes,
    operator_name,
    schema_of,
    value_of,
)

Rule = Callable[[RowPlaces, fx.Node, Sequence[fx.Node]], Place | None]


def rule_of(node: fx.Node) -> Rule | None:
    """How the operator of a node keeps rows apart; None if it is not known to."""
    rule = _RULES.get(operator_name(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return _along if rule is None and _dimensions(node) is not None else rule


def _pointwise(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Operands are aligned at the right. A batch size among the values would be another for some of the rows."""
    if operator_name(node) not in ("expand", "expand_as") and any(
        involves([value_of(argument)], rows.symbol) for argument in node.all_input_nodes
    ):
        return None
    from_right = {(_rank(operand) - place.axis, place.outer) for operand in batched if (place := rows.place(operand))}
    if len(from_right) != 1:
        return None
    distance, outer = from_right.pop()
    return Place(_rank(node) - distance, outer)


def _reshape(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """The rows lie behind as many elements as before: find the axis of the new shape that counts them there."""
    source = batched[0]
    place = rows.place(source)
    if place is None or len(batched) != 1:
        return None
    ahead = math.prod(rows.sizes(source)[: place.axis]) * place.outer
    passed = 1
    for axis, size in enumerate(rows.sizes(node)):
        if not ahead or not passed:  # a size that large numbers make zero
            return None
        outer, rest = divmod(ahead, passed)
        if rest == 0 and size % (outer * rows.length) == 0:
            return Place(axis, outer)
        passed *= size
    return None


def _permute(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    place = rows.place(batched[0])
    rank = _rank(node)
    assert place is not None
    order = list(range(rank))
    if operator_name(node) == "permute":
        order = [axis % rank for axis in argument_of(node, "dims")]
    else:
        first, second = (0, 1) if operator_name(node) == "t" else (argument_of(node, "dim0"), argument_of(node, "dim1"))
        order[first], order[second] = order[second], order[first]
    return Place(order.index(place.axis), place.outer)


def _along(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Works along its ``dim``, which must not be the axis of the rows; it may drop axes, or add one."""
    places = {rows.place(operand) for operand in batched}
    place = places.pop()
    ranks = {_rank(operand) for operand in batched}
    if place is None or places or len(ranks) != 1:
        return None
    rank, new_rank = ranks.pop(), _rank(node)
    span = max(rank, new_rank)
    dimensions = {axis % span for axis in _dimensions(node) or range(rank)}
    if new_rank > rank:
        return Place(place.axis + sum(axis <= place.axis for axis in dimensions), place.outer)
    if place.axis in dimensions:
        return None
    removed = sum(axis < place.axis for axis in dimensions) if new_rank < rank else 0
    return Place(place.axis - removed, place.outer)


def _linear(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    place = rows.place(batched[0])
    only_input = list(batched) == [node.args[0]]
    return place if only_input and place is not None and place.axis < _rank(node) - 1 else None


def _product(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Rows lie in a batch axis, in the lines of the left factor, or in the columns of the right one.

    Two factors that agree on the place have it in a batch axis, since a sum over the rows has them at the end of one
    factor and one before the end of the other.
    """
    if any(_rank(operand) < 2 for operand in node.all_input_nodes):
        return _product_with_vector(rows, node, batched)
    left, right = node.args[1:3] if operator_name(node) in ("addmm", "baddbmm") else node.args[:2]
    for factor, summed in ((left, 1), (right, 2)):
        assert isinstance(factor, fx.Node)
        place = rows.place(factor)
        if place is not None and place.axis == _rank(factor) - summed:
            return None
    return _pointwise(rows, node, batched)


def _product_with_vector(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """A factor loses the axis that is summed over: its last one on the left, on the right the one before."""
    left, right = node.all_input_nodes[:2]
    matrix, summed = (left, _rank(left) - 1) if _rank(right) == 1 else (right, _rank(right) - 2)
    place = rows.place(matrix)
    if operator_name(node) not in ("matmul", "mv") or list(batched) != [matrix] or place is None:
        return None
    return None if place.axis == summed else Place(place.axis - (place.axis > summed), place.outer)


def _einsum(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    if not isinstance(node.args[1], list | tuple):
        return None
    operands = [operand for operand in node.args[1] if isinstance(operand, fx.Node)]
    sides, result = einsum_axes(str(node.args[0]), [_rank(operand) for operand in operands])
    letters = set()
    for axes, operand in zip(sides, operands, strict=True):
        place = rows.place(operand)
        if place is not None:
            letters.add((axes[place.axis], place.outer))
    letter, outer = letters.pop()
    return None if letters or letter not in result else Place(result.index(letter), outer)


def _contraction(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """``inner`` and ``tensordot``: the left factor keeps its other axes, in their order and in front."""
    left = node.all_input_nodes[0]
    place, rank = rows.place(left), _rank(left)
    if node.args[0] is node.args[1]:  # each row with every other
        return None
    dims = argument_of(node, "dims_self")
    summed = [rank - 1] if dims is None else [axis % rank for axis in dims]
    if place is None or list(batched) != [left] or place.axis in summed:
        return None
    return Place(place.axis - sum(axis < place.axis for axis in summed), place.outer)


def _cell(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Each line of the input with that of the state."""
    places = {rows.place(operand) for operand in node.all_input_nodes[:2]}
    place = places.pop()
    both = set(batched) == set(node.all_input_nodes[:2]) and not places
    return place if both and place is not None and place.axis == 0 else None


def _bilinear(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Works over the last axis of two inputs."""
    place = _pointwise(rows, node, batched)
    return place if place is not None and place.axis < _rank(node) - 1 else None


def _attention(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Rows lie in the batch or head axes of query, key, value and mask."""
    place = _pointwise(rows, node, batched)
    return place if place is not None and place.axis < _rank(node) - 2 else None


def _normalise(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Works over the last axes, as many as ``normalized_shape`` has."""
    place, source = rows.place(batched[0]), batched[0]
    last = len(argument_of(node, "normalized_shape"))
    alone = list(batched) == [node.args[0]]
    return place if place is not None and alone and place.axis < _rank(source) - last else None


def _first_axis(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Works on all axes but the first; one axis less, and the first holds channels."""
    place, name = rows.place(batched[0]), operator_name(node)
    alone = list(batched) == [node.args[0]]
    spatial = re.search(r"(\d)d$", name)
    least = int(spatial[1]) + 2 if spatial else _LEAST_RANK.get(name, 3)
    return place if place is not None and alone and place.axis == 0 and _rank(batched[0]) >= least else None


_LEAST_RANK = {"im2col": 4, "pixel_shuffle": 4, "pixel_unshuffle": 4}


def _by_channel(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Works on each number by itself, with statistics that are kept for each channel of axis 1."""
    place = rows.place(batched[0])
    return place if place is not None and list(batched) == [node.args[0]] and place.axis != 1 else None


def _windows(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Takes windows of one axis apart, into a new one at the end."""
    place = rows.place(batched[0])
    axis = argument_of(node, "dimension") % _rank(batched[0])
    return place if place is not None and place.axis != axis else None


def _pad(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    place = rows.place(batched[0])
    return place if place is not None and place.axis < _rank(node) - len(argument_of(node, "pad")) // 2 else None


def _repeat(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    place = rows.place(batched[0])
    assert place is not None
    axis = place.axis + _rank(node) - _rank(batched[0])
    return Place(axis, place.outer) if argument_of(node, "repeats")[axis] == 1 else None


def _repeat_interleave(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Each line as often as the others, one time after another: the lines of a row stay together."""
    repeats = argument_of(node, "repeats")
    times = value_of(repeats) if isinstance(repeats, fx.Node) else repeats
    if argument_of(node, "dim") is None or isinstance(times, Tensor) or involves([times], rows.symbol):
        return None
    return rows.place(batched[0])


def _embedding(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    return rows.place(batched[0]) if list(batched) == [node.args[1]] else None


def _index(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Picks along later axes than that of the rows, by positions that all rows share, or for each row from a table."""
    place = rows.place(batched[0])
    indices = argument_of(node, "indices")
    indexed = [axis for axis, index in enumerate(indices) if index is not None]
    if place is None or len(batched) != 1:
        return None
    if batched[0] is node.args[0]:
        return place if place.axis < min(indexed) else None
    return Place(place.axis + indexed[0], place.outer) if len(indexed) == 1 else None


def _index_put(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Writes along later axes than that of the rows, at positions that all rows share."""
    target, indices, values = (argument_of(node, name) for name in ("self", "indices", "values"))
    place = rows.place(batched[0])
    indexed = [axis for axis, index in enumerate(indices) if index is not None]
    if place is None or target not in batched or set(batched) - {target, values} or place.axis >= min(indexed):
        return None
    return place if values not in batched or rows.place(values) == place else None


def _opaque(rows: RowPlaces, node: fx.Node, batched: Sequence[fx.Node]) -> Place | None:
    """Along the first axis, as far as a module was seen to compute its lines apart."""
    call, places = opaque_call(node), {rows.place(operand) for operand in batched}
    place = places.pop()
    if call is None or places or place is None or place.axis != 0:
        return None
    return place if call.rows == "any" or (call.rows == "blocks" and place.outer == 1) else None


def _rank(node: fx.Node) -> int:
    value = value_of(node)
    if isinstance(value, list | tuple):
        value = value[0]
    return value.dim() if isinstance(value, Tensor) else 0


def _dimensions(node: fx.Node) -> Sequence[int] | None:
    """The axes that an operator works along, empty for all of them; None if it has no such argument."""
    for name in ("dim", "dims"):
        if any(argument.name == name for argument in schema_of(node)):
            dimensions = argument_of(node, name)
            return [dimensions] if isinstance(dimensions, int) else list(dimensions or [])
    return None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "_to_copy", "to", "type_as", "clone", "contiguous", "dropout", "alias", "detach", "lift_fresh_copy",
            "copy", "expand", "expand_as", "where", "masked_fill", "log_sigmoid",
        ],
        _pointwise,
    ),
    **dict.fromkeys(
        [
            "view", "reshape", "_unsafe_view", "_reshape_copy", "flatten", "unflatten", "squeeze", "unsqueeze",
            "view_as_complex", "view_as_real",
        ],
        _reshape,
    ),
    **dict.fromkeys(["permute", "transpose", "t"], _permute),
    **dict.fromkeys(["mm", "bmm", "matmul", "addmm", "baddbmm", "_int_mm"], _product),
    **dict.fromkeys(SDPA, _attention),
    **dict.fromkeys(["layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"], _normalise),
    **dict.fromkeys(
        [
            *CONVOLUTIONS, "group_norm", "native_group_norm", "batch_norm", "instance_norm", "pixel_shuffle",
            "pixel_unshuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
            "upsample_bicubic2d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d", "adaptive_avg_pool2d",
            "_adaptive_avg_pool2d", "im2col", "col2im",
        ],
        _first_axis,
    ),
    "linear": _linear,
    "opaque": _opaque,
    "einsum": _einsum,
    "inner": _contraction,
    "tensordot": _contraction,
    "bilinear": _bilinear,
    **dict.fromkeys(CELLS, _cell),
    "constant_pad_nd": _pad,
    "pad": _pad,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "embedding": _embedding,
    "_native_batch_norm_legit_no_training": _by_channel,
    "unfold": _windows,
    "one_hot": lambda rows, node, batched: rows.place(batched[0]),
    "index": _index,
    "index_put": _index_put,
}  # fmt: skip
