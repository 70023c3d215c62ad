"""A branch that asks the current denoising step whether to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.program import Program

TAG = "lazy_branch"
"""``node.meta[TAG]`` is the index of the branch that a node belongs to."""


ADD = "lazy_add"
"""``node.meta[ADD]`` is the index of the branch whose output a residual add adds to its skip connection."""


class LazyStep(Protocol):
    """One evaluation of the model within a trajectory; it is passed through the graph as an ordinary input."""

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Outputs of a branch, computed or reused."""


class LazyBranch(nn.Module):
    """A gated branch: the body, and what is needed to run it on all rows of a batch or on some.

    Attributes:
        body: from the branch's inputs to the tuple of its outputs.
        branch: its description.
        row_axes: for each input, the axis that holds the rows of the batch; None for an input that all rows share.
        entry_positions: which inputs are the entries.
        base_positions: for each output the input that it is kept relative to; None where it is kept itself.
    """

    def __init__(self, body: fx.GraphModule, branch: ResidualBranch, row_axes: tuple[int | None, ...]) -> None:
        super().__init__()
        self.body = body
        self.branch = branch
        self.row_axes = row_axes
        names = [node.name for node in body.graph.find_nodes(op="placeholder")]
        self.entry_positions = tuple(names.index(entry.name) for entry in branch.entries)
        self.base_positions = tuple(
            None if output.relative_to is None else names.index(output.relative_to) for output in branch.outputs
        )
        self._run: Callable[..., tuple[Tensor, ...]] = body

    def forward(self, step: LazyStep, *inputs: Any) -> tuple[Tensor, ...]:
        return step.evaluate(self, inputs)

    def compute(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return self._run(*inputs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let ``torch.compile`` make what computes the body, with these options."""
        self._run = torch.compile(self.body, *args, **kwargs)

    def kept(self, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a cache keeps of computed outputs: a relative one less the input that it is relative to."""
        return tuple(
            output if base is None else output - inputs[base]
            for output, base in zip(outputs, self.base_positions, strict=True)
        )

    def restored(self, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of a branch that is reused, from what a cache holds, or what was extrapolated from it."""
        return tuple(
            value if base is None else inputs[base] + value
            for value, base in zip(kept, self.base_positions, strict=True)
        )

    def picked(self, inputs: Sequence[Any], rows: Tensor) -> list[Any]:
        """The inputs of some rows only: ``rows`` is ``int64[R]`` on their device."""
        return [
            value if axis is None else value.index_select(axis, rows)
            for value, axis in zip(inputs, self.row_axes, strict=True)
        ]

    def entries(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[position] for position in self.entry_positions]

    def rows(self, inputs: Sequence[Any]) -> int:
        """How many decisions a call takes: one per row, or one in all."""
        if not self.branch.row_separable:
            return 1
        position = next(position for position, axis in enumerate(self.row_axes) if axis is not None)
        axis = self.row_axes[position]
        return int(inputs[position].shape[axis])


def lazy_calls(program: Program) -> list[tuple[fx.Node, LazyBranch]]:
    """The calls of gated branches in the order in which they run."""
    modules = dict(program.graph_module.named_children())
    calls = program.graph.find_nodes(op="call_module", sort=True)
    return [(call, module) for call in calls if isinstance(module := modules[str(call.target)], LazyBranch)]
