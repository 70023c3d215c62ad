"""What residual streams would be at the end of a span if none of its branches added anything.

That is what reuse adds the kept difference to: most often the stream as it enters the span, after a concatenation of
two streams the same concatenation of what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.ir.operators import NUMBERS, PASSTHROUGH, operator_name, origins, size_text, value_of

SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})
LAYOUT = PASSTHROUGH | SPLITS | {"getitem", "select"}
"""Operators that hand on the values of one tensor, or some of them."""

JOINS = frozenset({"cat", "stack"})
_SUMS = frozenset({"add", "sub"})
_STARTS = frozenset({"addcmul", "lerp"})
_SCALINGS = frozenset({"mul", "div"})


@dataclass(frozen=True, eq=False)
class Carried:
    """A value without what branches added to it: ``node`` with other operands, or as it is if there are none.

    Attributes:
        node: what computes it, or a copy of which does.
        operands: by operand of the node, what takes its place in the copy.
    """

    node: fx.Node
    operands: Mapping[fx.Node, Carried] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        """Whether the graph has this value already."""
        return not self.operands

    @cached_property
    def leaves(self) -> dict[fx.Node, None]:
        """The values of the graph that it is made from, in order."""
        parts = (operand.leaves for operand in self.operands.values())
        return {self.node: None} if self.is_there else {leaf: None for part in parts for leaf in part}

    @cached_property
    def copied(self) -> dict[fx.Node, None]:
        """The nodes that have to be copied."""
        if self.is_there:
            return {}
        return {node: None for operand in self.operands.values() for node in operand.copied} | {self.node: None}

    def base_of(self, output: fx.Node) -> Carried | None:
        """A value of the type of ``output`` to keep its difference from; None if there is none.

        A single stream of its type that it is carried from is as good as the carried value, and is there.
        """
        streams = (next((node for node in origins(leaf) if _same_type(node, output)), None) for leaf in self.leaves)
        found = [node for node in dict.fromkeys(streams) if node is not None]
        if len(found) == 1:
            return Carried(found[0])
        return self if _same_type(self.node, output) else None


def carried_through(flow: Dataflow, inside: int) -> dict[fx.Node, Carried]:
    """For nodes that depend on a branch what they would be without the branches, where that can be told.

    1. Of a sum the operands stay that are carried from outside of the set by sums, joins and views alone: the others
       are what branches add.
    2. Views, casts, joins, parts, and products with a value from outside are repeated on what is carried.
    3. A part of a join is what was joined.

    ``inside`` is the set of these nodes; what does not belong to it depends on no branch, and is what it is.
    """
    found: dict[fx.Node, Carried] = {}

    def carried(node: fx.Node) -> Carried | None:
        return found.get(node) if inside >> flow.position[node] & 1 else Carried(node)

    for node in flow.members(inside):
        operands = {item: carried(item) for item in node.all_input_nodes if not isinstance(value_of(item), NUMBERS)}
        result = _carry(node, operands, inside, flow)
        if result is not None:
            found[node] = result
    return found


def _carry(node: fx.Node, operands: Mapping[fx.Node, Carried | None], inside: int, flow: Dataflow) -> Carried | None:
    name = operator_name(node)
    known = {item: value for item, value in operands.items() if value is not None}
    if name in _STARTS:
        start = known.get(node.all_input_nodes[0])
        return start if start is not None and _same_shape(start.node, node) else None
    if name in _SUMS and len(known) < len(operands):
        kept = [item for item in known if _same_shape(item, node)]
        positive = name == "add" or kept == node.all_input_nodes[:1]
        return known[kept[0]] if len(kept) == 1 and positive else None
    if len(known) < len(operands):
        return None
    if name in _SCALINGS and sum(inside >> flow.position[item] & 1 for item in operands) != 1:
        return None
    if name not in LAYOUT | JOINS | _SUMS | _SCALINGS:
        return None
    part = _part_of_join(node, known)
    changed = any(not value.is_there or value.node is not item for item, value in known.items())
    return part or Carried(node, known if changed else {})


def _part_of_join(node: fx.Node, known: Mapping[fx.Node, Carried]) -> Carried | None:
    """Of a slice of a concatenation the part that it is, if it is one."""
    if operator_name(node) != "slice" or len(known) != 1:
        return None
    (join,) = known.values()
    axis, start = (*node.args[1:3], 0, 0)[:2] if len(node.args) > 1 else (0, 0)
    if operator_name(join.node) != "cat" or (*join.node.args[1:], 0)[0] != axis or not isinstance(axis, int):
        return None
    begin = value_of(start) if isinstance(start, fx.Node) else start or 0
    offset: object = 0
    for part in join.node.args[0]:  # type: ignore[union-attr]
        assert isinstance(part, fx.Node)
        if size_text(offset) == size_text(begin) and _same_shape(part, node):
            return join.operands.get(part, Carried(part))
        offset = offset + value_of(part).shape[axis]
    return None


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    one, other = value_of(first), value_of(second)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return list(map(size_text, one.shape)) == list(map(size_text, other.shape))


def _same_type(first: fx.Node, second: fx.Node) -> bool:
    return _same_shape(first, second) and value_of(first).dtype == value_of(second).dtype
