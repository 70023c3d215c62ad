"""Gates as graphs of ATen operators, and their place in a program that is being lifted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from lazy_compile.config import BatchRule
from lazy_compile.ir.branch import BranchTensor, ResidualBranch
from lazy_compile.ir.branch_arms import formula
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.ir.program import Program
from lazy_compile.ir.state_tensors import GATE_BIAS, GATE_WEIGHT
from lazy_compile.policies.gate_layout import GateLayout

aten = torch.ops.aten


def gate(branch: ResidualBranch) -> fx.GraphModule:
    """``(*entries, weight, bias) -> compute_logit: float32[rows]``, as
    :func:`lazy_compile.policies.gate_table.compute_logit`.

    A product and a sum rather than a matrix product, which an engine might run in TF32.
    """

    def logit(*arguments: Any) -> Any:
        *entries, weight, bias = arguments
        pooled = [_pool(entry, spec, branch) for entry, spec in zip(entries, branch.entries, strict=True)]
        features = aten.cat.default(pooled, 1) if len(pooled) > 1 else pooled[0]
        return aten.add.Tensor(aten.sum.dim_IntList(aten.mul.Tensor(features, weight), [1]), bias)

    return formula([*(f"entry_{position}" for position in range(len(branch.entries))), "weight", "bias"], logit)


def decision(logits: Any, rule: BatchRule) -> Any:
    """Whether to compute, decided jointly over axis 0: ``float32[rows, ...] -> bool[...]``. A NaN computes.

    ``"per_sample"`` has no counterpart in a program with one conditional per branch and counts as ``"all_reuse"``.
    """
    reuses = aten._to_copy.default(aten.le.Scalar(logits, 0.0), dtype=torch.float32)
    if rule == "any_reuse":
        return aten.lt.Scalar(aten.amax.default(reuses, [0]), 0.5)
    if rule == "majority":
        return aten.le.Scalar(aten.sum.dim_IntList(aten.sub.Tensor(reuses, 0.5), [0]), 0.0)
    return aten.lt.Scalar(aten.amin.default(reuses, [0]), 0.5)


def add_predictor(
    program: Program, call: fx.Node, lazy: LazyBranch, inputs: Mapping[str, fx.Node], layout: GateLayout
) -> fx.Node:
    """``compute_logit: float32[rows]`` of a branch, in front of its call."""
    index, own = lazy.branch.index, layout.weights_of(lazy.branch.index)
    program.graph_module.add_submodule(f"gate_{index}", gate(lazy.branch))
    with program.graph.inserting_before(call):
        weight = aten.slice.Tensor(fx.Proxy(inputs[GATE_WEIGHT]), 0, own.start, own.stop)
        bias = aten.select.int(fx.Proxy(inputs[GATE_BIAS]), 0, layout.gate_of(index))
        return program.graph.call_module(f"gate_{index}", (*lazy.entries(call.args[1:]), weight.node, bias.node))


def add_decision(program: Program, call: fx.Node, index: int, logit: fx.Node, rule: BatchRule) -> fx.Node:
    """``should_compute: bool[]`` of a branch from the logits of its rows, in front of its call."""
    program.graph_module.add_submodule(f"decide_{index}", formula(["logit"], partial(decision, rule=rule)))
    with program.graph.inserting_before(call):
        return program.graph.call_module(f"decide_{index}", (logit,))


def logit_table(program: Program, logits: Mapping[int, fx.Node]) -> fx.Node:
    """``float32[rows, G]``; a branch that takes one decision for all rows repeats its logit."""
    graph, nodes = program.graph, list(logits.values())
    each = [logit for index, logit in logits.items() if program.branches[index].row_separable]
    if each and len(each) < len(logits):
        rows = graph.call_function(aten.sym_size.int, (each[0], 0))
        nodes = [item if item in each else graph.call_function(aten.expand.default, (item, [rows])) for item in nodes]
    return graph.call_function(aten.stack.default, (nodes, 1))


def _pool(entry: Any, spec: BranchTensor, branch: ResidualBranch) -> Any:
    """Mean over everything but rows and channels, in fp32: ``float32[rows, C]``."""
    rank = len(spec.shape)
    batch, channel = spec.batch_axis if branch.row_separable else None, spec.channel_axis % rank
    pooled = entry if spec.dtype == "float32" else aten._to_copy.default(entry, dtype=torch.float32)
    if others := [axis for axis in range(rank) if axis not in (batch, channel)]:
        pooled = aten.mean.dim(pooled, others)
    if batch is None:
        return aten.unsqueeze.default(pooled, 0)
    return pooled if batch < channel else aten.permute.default(pooled, [1, 0])
