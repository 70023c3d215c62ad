"""Groups of consecutive branches under one gate: fewer conditionals in an engine, fewer decisions to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lazy_compile.config import Group
from lazy_compile.ir.branch import ResidualBranch, block_starts
from lazy_compile.policies.gate_table import GateRow


def leaders_of(branches: Sequence[ResidualBranch], group: Group) -> tuple[int, ...]:
    """For each branch, by its index, the one whose gate decides for it: the first of its group to run.

    Args:
        branches: all of them, in the order in which they run.
        group: how many consecutive branches share a gate; ``"block"`` puts the branches of one transformer block under
            one, see :func:`lazy_compile.ir.branch.block_starts`.
    """
    leaders = dict.fromkeys((branch.index for branch in branches), 0)
    leader = 0
    for position, (branch, begins) in enumerate(zip(branches, block_starts(branches), strict=True)):
        if begins if group == "block" else position % group == 0:
            leader = branch.index
        leaders[branch.index] = leader
    return tuple(leaders[index] for index in sorted(leaders))


@dataclass(frozen=True)
class GateLayout:
    """Which gates there are, and which of them decides for each branch.

    Attributes:
        leaders: for each branch the one that decides for it.
        features: gate_features of each branch.
    """

    leaders: tuple[int, ...]
    features: tuple[int, ...]

    @classmethod
    def of(cls, branches: Sequence[ResidualBranch], leaders: Sequence[int] = ()) -> GateLayout:
        """Without leaders every branch decides for itself."""
        features = tuple(branch.gate_features for branch in branches)
        return cls(tuple(leaders) or tuple(range(len(branches))), features)

    @cached_property
    def gates(self) -> tuple[int, ...]:
        """The G branches that decide, in order."""
        return tuple(sorted(set(self.leaders)))

    def gate_of(self, branch: int) -> int:
        """Position of the gate that decides for a branch."""
        return self.gates.index(self.leaders[branch])

    @property
    def width(self) -> int:
        """Length of ``gate_weight``: the features of all gates."""
        return sum(self.features[index] for index in self.gates)

    def weights_of(self, branch: int) -> slice:
        """Where the weights of a branch that decides lie in ``gate_weight``."""
        start = sum(self.features[index] for index in self.gates if index < branch)
        return slice(start, start + self.features[branch])

    def row(self, row: GateRow) -> GateRow:
        """Of a row for all branches, what belongs to those that decide."""
        return GateRow(row.weight.cpu().float()[self._columns], row.bias.cpu().float()[list(self.gates)])

    @cached_property
    def _columns(self) -> Tensor:
        """``int64[width]``: where the weights of the branches that decide lie in a row for all branches."""
        starts = list(accumulate((0, *self.features)))
        return torch.cat([torch.arange(starts[index], starts[index + 1]) for index in self.gates])
