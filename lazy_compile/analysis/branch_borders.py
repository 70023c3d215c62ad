"""What crosses the border of a branch: its inputs and outputs, and whether rows of the batch can be computed apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lazy_compile.analysis.batch_rows import batch_axis, batch_rows, follow_rows
from lazy_compile.analysis.folded_rows import FOLDED, follow_folded_rows, unfolded
from lazy_compile.analysis.row_places import Place
from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch
from lazy_compile.ir.operators import CONVOLUTIONS, macs, operator_name, size_hint, size_text, value_of
from lazy_compile.ir.program import Program


@dataclass(frozen=True)
class BranchBorders:
    """Describes branches of one graph.

    Attributes:
        rows: the symbolic size of the batch; None if it is fixed.
        symbol: its name.
        folded: where tensors without an axis of that length hold their rows.
    """

    rows: torch.SymInt | None
    symbol: str | None
    folded: Mapping[fx.Node, Place]

    @classmethod
    def of(cls, program: Program) -> BranchBorders:
        rows = batch_rows(program)
        symbol = None if rows is None else size_text(rows)
        return cls(rows, symbol, follow_folded_rows(program.graph, symbol))

    def describe(
        self,
        body: Sequence[fx.Node],
        entries: Sequence[fx.Node],
        *,
        index: int,
        name: str,
        kind: BranchKind,
        path: str,
        bases: Mapping[fx.Node, fx.Node] | None = None,
    ) -> ResidualBranch:
        """The branch whose body are these nodes, in graph order. Tensors with folded rows are marked as such.

        Args:
            body: its nodes.
            entries: its inputs that a gate reads.
            bases: outputs that are kept relative to an input, and that input, which the body need not read.
        """
        bases = bases or {}
        inside = set(body)
        inputs = list(dict.fromkeys([*inputs_of(body), *bases.values()]))
        outputs = [node for node in body if isinstance(value_of(node), Tensor) and set(node.users) - inside]
        reason, axes = follow_rows(body, inputs, entries, outputs, self.symbol, self.folded)
        for node, axis in axes.items():
            node.meta[FOLDED] = axis
        return ResidualBranch(
            index=index,
            name=name,
            kind=kind,
            path=path,
            macs=sum(macs(node) for node in body),
            entries=tuple(self._border(node, _channel_axis(node, inside), axes.get(node)) for node in entries),
            outputs=tuple(self._border(node, -1, axes.get(node), bases.get(node)) for node in outputs),
            row_separable=not reason,
            why_not_separable=reason,
        )

    def _border(
        self, node: fx.Node, channel_axis: int, folded_at: int | None, base: fx.Node | None = None
    ) -> BranchTensor:
        """A tensor at the border, where rows that are folded into an axis are taken out of it."""
        value = unfolded(node, folded_at, self.rows)
        shape = tuple(map(size_hint, value.shape))
        if folded_at is not None and channel_axis > folded_at:
            channel_axis += 1
        size = value.element_size() * math.prod(shape)
        dtype = str(value.dtype).removeprefix("torch.")
        axis = batch_axis(value, self.symbol)
        return BranchTensor(node.name, shape, dtype, axis, channel_axis, size, None if base is None else base.name)


def inputs_of(body: Sequence[fx.Node]) -> list[fx.Node]:
    """What the nodes read from outside, each once."""
    inside = set(body)
    return list(dict.fromkeys(node for member in body for node in member.all_input_nodes if node not in inside))


def _channel_axis(entry: fx.Node, inside: set[fx.Node]) -> int:
    """Channels come second where a convolution reads the entry, else last; their number is the model's."""
    readers = [user for user in entry.users if user in inside]
    if any(operator_name(user) in CONVOLUTIONS for user in readers):
        return 1
    fixed = [axis for axis, size in enumerate(value_of(entry).shape) if isinstance(size, int)]
    return fixed[-1] - value_of(entry).dim() if fixed else -1
