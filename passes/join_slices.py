"""Turn a tensor that is written slice by slice into one that is joined from its slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from lazy_compile.ir.operators import operator_name, origins, value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class JoinSlices(GraphPass):
    """One copy where functionalisation made one for every slice.

    ::

        %base = aten.empty_like(%x)                               |
        %even = aten.slice(%base, 3, 0, MAX, 2)                   |
        %a    = aten.copy(%even, %p)                              |
        %one  = aten.slice_scatter(%base, %a, 3, 0, MAX, 2)       |   %pair = aten.stack([%p, %q], 4)
        %odd  = aten.slice(%one, 3, 1, MAX, 2)                    |   %two  = aten.flatten(%pair, 3, 4)
        %b    = aten.copy(%odd, %q)                               |
        %two  = aten.slice_scatter(%one, %b, 3, 1, MAX, 2)        |

    Rotary embeddings are written so: ``out[..., 0::2] = p; out[..., 1::2] = q``. In a functional graph each write
    copies all of ``out``. Rules:

    1. A copy of a value into a tensor of the same shape and device is the value, cast if their dtypes differ. A write
       that reaches every place is what it writes. Results that the caller receives keep their copies, so that he may
       write to them.
    2. Writes along one axis of a known length that no one else reads in between, and that together reach every place
       once, do not need what was there before. Interleaved ones (``i::k`` for every ``i < k``) are stacked and
       flattened, ranges that lie end to end are concatenated, single places (``aten.select_scatter``) are stacked.

    Numerics are preserved bit for bit.
    """

    def apply(self, program: Program) -> bool:
        returned = {origin for node in program.graph.output_node().all_input_nodes for origin in origins(node)}
        modified = False
        for node in list(program.graph.nodes):
            if node not in returned and (value := _written_whole(node)) is not None:
                node.replace_all_uses_with(_cast(node, value))
                modified = True
        modified |= program.graph.eliminate_dead_code()
        for node in reversed(list(program.graph.nodes)):
            if node.users and (pieces := _pieces(node)):
                node.replace_all_uses_with(_join(node, pieces))
                modified = True
        return program.graph.eliminate_dead_code() or modified


@dataclass(frozen=True)
class _Write:
    value: fx.Node
    places: range


def _written_whole(node: fx.Node) -> fx.Node | None:
    """The value that a copy or a write puts in every place of its result."""
    if operator_name(node) not in ("copy", "slice_scatter") or not isinstance(value := node.args[1], fx.Node):
        return None
    into, given = value_of(node), value_of(value)
    alike = isinstance(given, Tensor) and (str(into.shape), into.device) == (str(given.shape), given.device)
    return value if alike else None


def _cast(node: fx.Node, value: fx.Node) -> fx.Node:
    dtype = value_of(node).dtype
    if dtype == value_of(value).dtype:
        return value
    return _call(node, aten._to_copy.default, value, dtype=dtype)


def _pieces(last: fx.Node) -> list[_Write]:
    """The writes that end in ``last`` in the order of their places, if they can be joined; else nothing."""
    writes: list[_Write] = []
    node: Any = last
    while (write := _as_write(node, last)) is not None and (node is last or len(node.users) == 1):
        writes.append(write)
        node = node.args[0]
    writes.sort(key=lambda write: write.places.start)
    return writes if writes and _fill(writes, value_of(last).shape[_axis(last)]) else []


def _as_write(node: Any, last: fx.Node) -> _Write | None:
    if not isinstance(node, fx.Node) or (axis := _axis(node)) is None:
        return None
    bounds: tuple[Any, ...] = node.args[3:]
    length, value = value_of(node).shape[axis], node.args[1]
    if (node.target, axis) != (last.target, _axis(last)) or not isinstance(length, int):
        return None
    if not isinstance(value, fx.Node) or value_of(value).dtype != value_of(node).dtype:
        return None
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    places = range(length)
    if operator_name(node) == "select_scatter":
        first = places[bounds[0]]
        return _Write(value, places[first : first + 1])
    return _Write(value, places[slice(*(*bounds, None, None, None)[:3])])


def _axis(node: fx.Node) -> int | None:
    if operator_name(node) not in ("slice_scatter", "select_scatter") or node.kwargs or len(node.args) < 3:
        return None
    rank: int = value_of(node).dim()
    return int(node.args[2]) % rank  # type: ignore[arg-type]


def _fill(writes: list[_Write], length: int) -> bool:
    """Whether the writes, in order, reach each of ``length`` places once and are of one kind."""
    places, count = [write.places for write in writes], len(writes)
    if places[0].step == count > 1:
        return length % count == 0 and places == [range(length)[first::count] for first in range(count)]
    stops = [place.stop for place in places]
    return stops[-1] == length and places == [range(*ends) for ends in zip([0, *stops[:-1]], stops, strict=True)]


def _join(node: fx.Node, writes: list[_Write]) -> fx.Node:
    axis, values = _axis(node), [write.value for write in writes]
    assert axis is not None
    if operator_name(node) == "select_scatter":
        return _call(node, aten.stack.default, values, axis)
    if writes[0].places.step > 1:
        return _call(node, aten.flatten.using_ints, _call(node, aten.stack.default, values, axis + 1), axis, axis + 1)
    return _call(node, aten.cat.default, values, axis)


def _call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        call = before.graph.call_function(target, args, kwargs)
    call.meta = dict(before.meta)
    values = fx.map_arg(args, value_of)
    with value_of(before).fake_mode, enable_python_dispatcher():
        call.meta["val"] = target(*values, **kwargs)
    return call
