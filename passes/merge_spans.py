"""Make spans of several branches that are computed or reused as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import fx

from lazy_compile.analysis.branch_borders import BranchBorders
from lazy_compile.analysis.carried_streams import Carried
from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.folded_rows import FOLDED
from lazy_compile.analysis.residual_branches import common_path
from lazy_compile.analysis.spans import BranchStack, Span
from lazy_compile.config import Granularity, Probe
from lazy_compile.ir.branch import BranchKind, Refusal, ResidualBranch, block_starts
from lazy_compile.ir.lazy_branch import ADD, TAG
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program


@dataclass(frozen=True)
class MergeSpans(GraphPass):
    """Put the branches between two cuts, and what lies between them, into one branch.

    ::

        %n1   = layer_norm(%x)                         |  %n1   = layer_norm(%x)                [branch 0]
        %a    = linear(%n1, ...)        [branch 0]     |  %a    = linear(%n1, ...)              [branch 0]
        %add1 = add(%x, %a)                            |  %add1 = add(%x, %a)                   [branch 0]
        %n2   = layer_norm(%add1)                      |  %n2   = layer_norm(%add1)             [branch 0]
        %m    = linear(%n2, ...)        [branch 1]     |  %m    = linear(%n2, ...)              [branch 0]
        %add2 = add(%add1, %m)                         |  %add2 = add(%add1, %m)                [branch 0]
                                                          output %add2, relative to %x

    1. ``granularity`` is ``"block"`` for one span a transformer block, a number for so many spans of about the same
       work, ``"model"`` for one of all; :mod:`lazy_compile.analysis.spans` says where a stack can be cut. Where it
       cannot be cut as asked, there are fewer spans; where it cannot be ended, the branches stay. A refusal says why.
    2. What an output is relative to stays outside. Where it is the concatenation of two streams that enter, say, that
       is repeated outside.
    3. With ``probe="first_block"`` the branches up to the end of the first block that adds to the stream of the model's
       output belong to no span, and always compute.

    Numerics are preserved bit for bit.
    """

    granularity: Granularity = "branch"
    probe: Probe | None = None

    def apply(self, program: Program) -> bool:
        branches = program.branches
        if self.granularity == "branch" or not branches or any(b.kind is BranchKind.SPAN for b in branches):
            return False
        stack = BranchStack(Dataflow(program.graph), len(branches))
        if reason := stack.why_no_cut(stack.count):
            return _refuse(program, f"no span: the stack has no end, since {reason}")
        blocks = _positions(stack, branches)
        first = 0
        if self.probe is not None:
            first = next((position for position in blocks if position > stack.first_of_output), 0)
            if not first or first == stack.count:
                return _refuse(program, "no span: there is no block behind the first one, which is the probe")
        borders = self._borders(stack, branches, first, blocks)
        if isinstance(self.granularity, int) and len(borders) - 1 < self.granularity:
            _refuse(program, f"{len(borders) - 1} spans instead of {self.granularity}: there are no more cuts")
        spans = [stack.span(*ends) for ends in pairwise(borders)]
        _tag(program, spans)
        _describe(program, spans, [branches[start:end] for start, end in pairwise(borders)])
        return True

    def _borders(
        self, stack: BranchStack, branches: Sequence[ResidualBranch], first: int, blocks: Sequence[int]
    ) -> list[int]:
        """Where spans begin, and where the last one ends."""
        inner = [position for position in blocks if first < position < stack.count]
        if self.granularity == "block":
            return [first, *inner, stack.count]
        count = 1 if self.granularity == "model" else int(self.granularity)
        if len(inner) < count - 1:
            inner = [at for at in range(first + 1, stack.count) if not stack.why_no_cut(at)]
        work = list(accumulate((branch.macs for branch in branches), initial=0))
        chosen: list[int] = []
        for number in range(1, count):
            left = [at for at in inner if not chosen or at > chosen[-1]]
            spare = len(left) - (count - 1 - number)  # as many are needed behind it
            wanted = work[first] + (work[-1] - work[first]) * number / count
            if left:
                chosen.append(min(left[: max(1, spare)], key=lambda at: abs(work[at] - wanted)))
        return [first, *chosen, stack.count]


def _positions(stack: BranchStack, branches: Sequence[ResidualBranch]) -> list[int]:
    """Cuts at which a block begins, and the end."""
    begins = [at for at, starts in enumerate(block_starts(branches)) if starts and at]
    return [*(at for at in begins if not stack.why_no_cut(at)), stack.count]


def _refuse(program: Program, reason: str) -> bool:
    refusal = Refusal("", "", reason)
    if refusal in program.refusals:
        return False
    program.refusals = (*program.refusals, refusal)
    return True


def _tag(program: Program, spans: Sequence[Span]) -> None:
    for node in program.graph.nodes:
        for key in (TAG, ADD, FOLDED):
            node.meta.pop(key, None)
    for index, span in enumerate(spans):
        for node in span.body:
            node.meta[TAG] = index


def _describe(program: Program, spans: Sequence[Span], parts: Sequence[Sequence[ResidualBranch]]) -> None:
    order = {node: (position, 0) for position, node in enumerate(program.graph.nodes)}
    bases = [{output: _made(program.graph, base, order, {}) for output, base in span.bases.items()} for span in spans]
    borders = BranchBorders.of(program)
    paths = [common_path([branch.path for branch in branches]) for branches in parts]
    seen = Counter(paths)
    program.branches = tuple(
        borders.describe(
            span.body,
            span.entries,
            index=index,
            name=path if path and seen[path] == 1 else f"{branches[0].name}..{branches[-1].name}",
            kind=BranchKind.SPAN,
            path=path,
            bases=base,
        )
        for index, (span, path, branches, base) in enumerate(zip(spans, paths, parts, bases, strict=True))
    )


def _made(
    graph: fx.Graph, value: Carried, order: dict[fx.Node, tuple[int, int]], made: dict[Carried, fx.Node]
) -> fx.Node:
    """The node that has a carried value; copies stand behind the last of their operands."""
    if value.is_there:
        return value.node
    if value not in made:
        operands = {item: _made(graph, operand, order, made) for item, operand in value.operands.items()}
        read = [operands.get(item, item) for item in value.node.all_input_nodes]
        last = max(read, key=order.__getitem__)
        with graph.inserting_after(last):
            copy = graph.node_copy(value.node, lambda item: operands.get(item, item))
        copy.meta = {key: item for key, item in value.node.meta.items() if key not in (TAG, ADD, FOLDED)}
        order[copy] = (order[last][0], order[last][1] + 1)
        made[value] = copy
    return made[value]
