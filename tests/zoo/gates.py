"""Gates that take the two rows of a batch apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lazy_compile import GateTable, LazyModule, Policy
from lazy_compile.policies.gate_table import compute_logit
from lazy_compile.policies.policy import GateQuery
from zoo.subject import Call, run


class Recorder(Policy):
    """Computes everywhere, and notes what gates without a bias would say."""

    def __init__(self, weight: torch.Tensor, features: Sequence[int]) -> None:
        self.weight = weight.split(list(features), dim=1)
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self.times: dict[int, float] = {}

    def should_compute(self, query: GateQuery) -> bool:
        self.times[query.step] = query.timestep
        weight = self.weight[query.branch.index][query.step]
        self.logits[query.step, query.branch.index] = compute_logit(
            query.branch, query.entries, weight, torch.zeros(())
        )
        return True

    def observe(self, query: GateQuery) -> None:
        self.should_compute(query)


def mixed_gates(lazy: LazyModule, calls: Sequence[Call], seed: int) -> GateTable:
    """One row per step, whose biases lie between the logits of the rows of these calls.

    A gate that reads a mix of rows gets zero weights: it decides by a random bias, in any batch alike.
    """
    generator = torch.Generator().manual_seed(seed)
    features = tuple(branch.gate_features for branch in lazy.branches)
    weight = torch.randn(len(calls), sum(features), generator=generator)
    lazy.policy = recorder = Recorder(weight, features)
    run(lazy, calls)
    bias = torch.zeros(len(calls), len(features))
    for (step, index), logit in recorder.logits.items():
        branch = lazy.branches[index]
        if branch.row_separable:
            bias[step, index] = -logit.mean()
        else:
            recorder.weight[index][step] = 0.0
            bias[step, index] = torch.randn((), generator=generator)
    knots = torch.tensor([recorder.times[step] for step in range(len(calls))], dtype=torch.float64)
    return GateTable(features, knots, weight, bias)
