"""Where a stack of residual branches can be cut into spans, and what belongs to each.

A span is a run of branches with all that lies between them, norms, modulation and output gates included, which is
computed or reused as one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from lazy_compile.analysis.branch_borders import inputs_of
from lazy_compile.analysis.carried_streams import JOINS, LAYOUT, Carried, carried_through
from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.residual_branches import exclusive_producers, with_parts
from lazy_compile.ir.lazy_branch import ADD, TAG
from lazy_compile.ir.operators import NUMBERS, is_heavy, macs, operator_name, origins, size_hint, value_of

_LARGEST_BASE = 0.2
_IDENTITY_FIRST = frozenset({"addcmul", "lerp", "sub"})


@dataclass(frozen=True)
class Span:
    """A run of branches.

    Attributes:
        body: its nodes, in graph order.
        entries: the streams that it reads.
        bases: for outputs that are kept relative to what enters, what that is.
    """

    body: list[fx.Node]
    entries: list[fx.Node]
    bases: dict[fx.Node, Carried]


class BranchStack:
    """The branches of a graph in the order in which they run, as positions 0 to G.

    1. Before position i lies all that the residual adds of the first i branches are computed from. Position i is a
       *cut* if that holds nothing of a later branch, and all that is read behind it and depends on the latents is a
       stream.
    2. A *stream* is a residual add, seen through views, casts and parts; or what is added or joined to something
       later on as it is, as the skip connections of a U-Net are.
    3. A span between two cuts is every node on a path from the streams at the first to those at the second. Streams
       that begin inside, as that of a text does, begin where its first branch reads them.
    4. It also takes heavy operators that feed nothing but it (adaLN layers), with what lies between.
    5. An output is kept relative to what it would be if the branches added nothing, see
       :mod:`lazy_compile.analysis.carried_streams`. Where that cannot be told (behind a linear layer that merges a
       long skip connection), or would take more than a fifth of the work, it is kept itself.
    """

    def __init__(self, flow: Dataflow, count: int) -> None:
        self.flow = flow
        self.count = count
        self.bodies = [0] * count
        self.adds: list[list[fx.Node]] = [[] for _ in range(count)]
        for position, node in enumerate(flow.nodes):
            if TAG in node.meta:
                self.bodies[node.meta[TAG]] |= 1 << position
            if ADD in node.meta:
                self.adds[node.meta[ADD]].append(node)
        self._before: dict[int, int] = {0: 0}

    def before(self, position: int) -> int:
        """Everything that the residual adds of the branches before a position are computed from."""
        if position not in self._before:
            result = self.before(position - 1) if position > 1 else 0
            for add in self.adds[position - 1]:
                result |= self.flow.ancestors(add)
            self._before[position] = result
        return self._before[position]

    def why_no_cut(self, position: int) -> str:
        """Empty if the stack can be cut here; its end is one more cut."""
        before = self.before(position)
        for later in range(position, self.count):
            if before & (self.bodies[later] | self.flow.bits(self.adds[later])):
                return f"branch {later} feeds an earlier one"
        for node in self.live(position):
            if not self._is_stream(node, before):
                return f"{node.name} ({operator_name(node)}) is read behind it, and is no residual stream"
        return ""

    def live(self, position: int) -> list[fx.Node]:
        """What lies before a position, depends on a stream, and is read behind it; of a part of it only the part."""
        before = self.before(position)
        found = [
            node
            for node in self.flow.members(before & self._of_streams)
            if node.op != "placeholder" and any(not before >> self.flow.position[user] & 1 for user in node.users)
        ]
        if position < self.count:
            return found
        return [part for node in found for part in self._read_parts(node, before)]

    def span(self, first: int, end: int) -> Span:
        """The branches from ``first`` up to ``end``, which are cuts."""
        flow, before = self.flow, self.before(first)
        roots = self._roots(first, end)
        informed = self._informed(roots)
        targets = [node for node in self.live(end) if informed & ~before & flow.bits([node])]
        reached = 0
        for target in targets:
            reached |= flow.informed_by(target)
        region = informed & reached & ~before & ~flow.bits(roots)
        made = self._made(first, end)
        carried = carried_through(flow, region & made)
        most = _LARGEST_BASE * self._work(region)
        bases = {
            target: base
            for target in targets
            if target in carried
            and (base := carried[target].base_of(target)) is not None
            and not self._read_by(base) & made  # a size, say
            and self._work(self._read_by(base) & region) <= most
        }
        outside = 0
        for base in bases.values():
            outside |= self._read_by(base)
        body = with_parts(flow, region & ~outside)
        forbidden = before | outside | self._of_streams
        for root in roots:
            forbidden |= flow.ancestors(root)
        body = with_parts(flow, body | exclusive_producers(flow, body, forbidden, self._heavy))
        nodes = list(flow.members(body))
        entries = [node for node in inputs_of(nodes) if informed & flow.bits([node]) and _is_tensor(node)]
        return Span(nodes, entries, bases)

    @property
    def first_of_output(self) -> int:
        """The first branch that adds to the stream that the model's output is made of."""
        flow, output = self.flow, self.flow.nodes[-1].all_input_nodes[0]
        last = [node for node in self.live(self.count) if flow.depends(output, node)]
        carried = carried_through(flow, self._made(0, self.count))
        starts = {leaf for node in last if node in carried for leaf in carried[node].leaves}
        for index, adds in enumerate(self.adds):
            if any(starts & set(carried[add].leaves) for add in adds if add in carried):
                return index
        return 0

    def _roots(self, first: int, end: int) -> list[fx.Node]:
        """The streams that enter: those that live on from before, and those that begin with a branch of the span."""
        flow, made = self.flow, self._made(first, end)
        roots = self.live(first) if first else []
        informed = self._informed(roots)
        begins = [
            list(origins(operand))[-1]
            for adds in self.adds[first:end]
            for add in adds
            for operand in add.all_input_nodes[: 1 if operator_name(add) in _IDENTITY_FIRST else 2]
            if not made >> flow.position[operand] & 1
        ]
        for source in sorted(dict.fromkeys(begins), key=flow.position.__getitem__):
            if not informed >> flow.position[source] & 1:
                roots.append(source)
                informed |= flow.informed(source)
        return roots

    def _made(self, first: int, end: int) -> int:
        """Everything that depends on the bodies of some branches."""
        made = 0
        for index in range(first, end):
            for node in self.flow.members(self.bodies[index] & ~made):
                made |= self.flow.descendants(node)
        return made

    def _read_by(self, base: Carried) -> int:
        """All that has to be computed for a base, which therefore stays outside."""
        sizes = [item for node in base.copied for item in node.all_input_nodes if isinstance(value_of(item), NUMBERS)]
        result = 0
        for node in (*base.leaves, *sizes):
            result |= self.flow.ancestors(node)
        return result

    def _work(self, nodes: int) -> int:
        return sum(map(macs, self.flow.members(nodes & self._heavy)))

    def _informed(self, nodes: Iterable[fx.Node]) -> int:
        result = 0
        for node in nodes:
            result |= self.flow.informed(node)
        return result

    @cached_property
    def _of_streams(self) -> int:
        """Every node that depends on what some branch is added to."""
        return self._informed(self._roots(0, self.count))

    @cached_property
    def _heavy(self) -> int:
        return self.flow.bits(node for node in self.flow.nodes if is_heavy(node))

    def _is_stream(self, node: fx.Node, before: int) -> bool:
        source: object = node
        while isinstance(source, fx.Node):
            if ADD in source.meta:
                return True
            source = source.args[0] if operator_name(source) in LAYOUT else None
        frontier, seen = [node], {node}
        while frontier:
            value = frontier.pop()
            for user in value.users:
                if user in seen or TAG in user.meta or before >> self.flow.position[user] & 1:
                    continue
                seen.add(user)
                name = operator_name(user)
                if name == "add" or name in JOINS or (name in _IDENTITY_FIRST and user.args[0] is value):
                    return True
                if name in LAYOUT:
                    frontier.append(user)
        return False

    def _read_parts(self, node: fx.Node, before: int) -> list[fx.Node]:
        """The slices of a stream behind the last branch, if nothing else of it is read: text tokens are not kept."""
        users = [user for user in node.users if not before >> self.flow.position[user] & 1]
        slices = all(operator_name(user) == "slice" for user in users)
        return users if slices and sum(map(_size, users)) < _size(node) else [node]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), Tensor)


def _size(node: fx.Node) -> int:
    size = 1
    for length in value_of(node).shape:
        size *= size_hint(length)
    return size
