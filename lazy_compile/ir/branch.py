"""What discovery finds in a model: residual branches, and candidates that it refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class BranchKind(Enum):
    """What a residual branch computes, read from its operators and never from a class or module name."""

    SELF_ATTENTION = "self_attention"
    CROSS_ATTENTION = "cross_attention"
    JOINT_ATTENTION = "joint_attention"
    MLP = "mlp"
    PARALLEL = "parallel"
    CONV = "conv"
    SPAN = "span"
    """A run of blocks between two cuts, see :mod:`lazy_compile.analysis.spans`."""


@dataclass(frozen=True)
class BranchTensor:
    """A tensor at the border of a branch.

    Attributes:
        name: the graph node that makes it.
        shape: its shape at capture; dynamic sizes appear as the value they had.
        dtype: ``"float32"`` and so on.
        batch_axis: the axis along which the rows of the batch lie, or None.
        channel_axis: the axis that a gate keeps when it pools an entry over its tokens.
        bytes: its size in memory at the captured shape.
        relative_to: of an output: the input of the branch, of the same shape and dtype, that a cache keeps the
            difference from. A branch that is reused returns this input as it is now, plus what was kept. None: the
            output itself is kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    batch_axis: int | None
    channel_axis: int
    bytes: int
    relative_to: str | None = None


@dataclass(frozen=True)
class ResidualBranch:
    """One attention or MLP body, or a span of several, that can be computed, or reused from an earlier denoising step.

    Attributes:
        index: position in execution order; column of a schedule and of a gate table.
        name: unique and stable for a given model: its path, with a number where several share it.
        kind: see :class:`BranchKind`.
        path: module path of the operators inside, for people; it plays no part in discovery.
        macs: multiply-accumulates of one evaluation of the body at the captured shape.
        entries: inputs that depend on the skip connection (the modulated activations): what the gate reads.
        outputs: values of the body that are used outside it: what is cached.
        row_separable: whether single rows of a batch can be computed alone; if not, one decision serves a call.
        why_not_separable: the reason, empty if separable.
    """

    index: int
    name: str
    kind: BranchKind
    path: str
    macs: int
    entries: tuple[BranchTensor, ...]
    outputs: tuple[BranchTensor, ...]
    row_separable: bool
    why_not_separable: str = ""

    @property
    def gate_features(self) -> int:
        """Length of the pooled vector that the gate reads: the channels of all entries together."""
        return sum(entry.shape[entry.channel_axis] for entry in self.entries)

    @property
    def output_bytes(self) -> int:
        return sum(output.bytes for output in self.outputs)


_ALONE = (BranchKind.PARALLEL, BranchKind.CONV, BranchKind.SPAN)


def block_starts(branches: Sequence[ResidualBranch]) -> Iterator[bool]:
    """Whether a transformer block begins with each branch, in the order in which they run.

    A block is a run of attention branches with the run of MLPs behind it. A branch that holds both stands alone.
    """
    before: BranchKind | None = None
    for branch in branches:
        kind = branch.kind
        yield before is None or kind in _ALONE or before in _ALONE or (before is BranchKind.MLP and kind is not before)
        before = kind


@dataclass(frozen=True)
class Refusal:
    """A residual add that was looked at and not gated."""

    node: str
    path: str
    reason: str
