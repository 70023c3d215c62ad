"""What lifted and lowered programs are made of: the select operator, and the arms of a branch as small ATen graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from lazy_compile.branch import BranchTensor, ResidualBranch
from lazy_compile.config import BatchRule, ReuseArm
from lazy_compile.extrapolation import SCALARS, moved_on, new_deltas
from lazy_compile.program import Program

aten = torch.ops.aten

STATE_NAMES = "state_names"
"""``output_node.meta[STATE_NAMES]`` names the trailing outputs of a lifted program: slots, then ``compute_logits``."""


@torch.library.custom_op("lazy_compile::select", mutates_args=())
def select(should_compute: Tensor, computed: Tensor, reused: Tensor, branch: int) -> Tensor:
    """``computed`` if ``should_compute: bool[]`` holds, else ``reused``; both have one shape and dtype.

    In a graph for an engine it stands for a conditional: what only ``computed`` needs may be skipped.
    """
    return torch.where(should_compute, computed, reused).contiguous()


@select.register_fake
def _(should_compute: Tensor, computed: Tensor, reused: Tensor, branch: int) -> Tensor:
    return computed.new_empty(computed.shape)


class BranchArms(nn.Module):
    """Both arms of a branch: the eager reference for engines, which replace it by a conditional.

    The state of a branch is its slots: ``cache`` for each output, and for linear reuse the :data:`SCALARS` of
    :mod:`lazy_compile.extrapolation`, then ``cache`` and ``delta`` for each output.

    Attributes:
        decide: ``logit: float32[rows] -> should_compute: bool[]``.
        body: ``inputs -> outputs``.
        reuse: ``state -> outputs``, which are also the next caches.
        renew: ``(*state, *outputs) -> next deltas`` of a branch that computes; None unless reuse is linear.
        outputs: how many outputs the branch has.
    """

    def __init__(self, body: fx.GraphModule, branch: ResidualBranch, reuse: ReuseArm, rule: BatchRule) -> None:
        super().__init__()
        self.outputs = len(branch.outputs)
        self.decide = formula(["logit"], lambda logit: decision(logit, rule))
        self.body = body
        positions = range(self.outputs)
        caches = [f"cache_{position}" for position in positions]
        if reuse == "last":
            self.reuse = formula(caches, lambda *state: state)
            self.renew = None
            return
        state = [*SCALARS, *caches, *(f"delta_{position}" for position in positions)]
        dtypes = [getattr(torch, output.dtype) for output in branch.outputs]
        self.reuse = formula(state, lambda *state: moved_on(*self._parts(state), dtypes))
        self.renew = formula(
            [*state, *(f"output_{position}" for position in positions)],
            lambda *given: new_deltas(*self._parts(given[: len(state)]), given[len(state) :], dtypes),
        )

    def forward(self, logit: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """From ``(logit, *state, *inputs)`` to ``(*outputs, *next_cache, [*next_delta])``."""
        state, inputs = self.split(arguments)
        if self.decide(logit):
            outputs = tuple(self.body(*inputs))
            return (*outputs, *outputs, *(self.renew(*state, *outputs) if self.renew else ()))
        outputs = tuple(self.reuse(*state))
        return (*outputs, *outputs, *self.deltas(state))

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What ``reuse`` takes, and what ``body`` takes."""
        count = len(SCALARS) + 2 * self.outputs if self.renew else self.outputs
        return arguments[:count], arguments[count:]

    def deltas(self, state: Sequence[Any]) -> Sequence[Any]:
        """The slots that reuse leaves as they are."""
        return self._parts(state)[2] if self.renew else ()

    def _parts(self, state: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        slots = state[len(SCALARS) :]
        return state[: len(SCALARS)], slots[: self.outputs], slots[self.outputs :]


def gate(branch: ResidualBranch) -> fx.GraphModule:
    """``(*entries, weight, bias) -> compute_logit: float32[rows]``, as :func:`lazy_compile.gate.compute_logit`.

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


def formula(names: Sequence[str], function: Callable[..., Any]) -> fx.GraphModule:
    """The graph of a function that calls ATen operators on its arguments, which are named ``names``."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    result = function(*(fx.Proxy(graph.placeholder(name), tracer) for name in names))
    graph.output(tuple(item.node for item in result) if isinstance(result, tuple) else result.node)
    return fx.GraphModule({}, graph)


def inline(before: fx.Node, body: fx.GraphModule, arguments: Sequence[Any], **meta: Any) -> Any:
    """Copy the nodes of ``body`` in front of a node, its inputs replaced by ``arguments``; returns its output."""
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True))
    with before.graph.inserting_before(before):
        output = before.graph.graph_copy(body.graph, copies)
    for node in body.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node].meta.update(meta)
    return output


def replace_results(call: fx.Node, results: Sequence[fx.Node]) -> None:
    """Put ``results`` in the place of a call that returns a tuple."""
    for user in list(call.users):
        assert user.target is operator.getitem
        result = results[user.args[1]]  # type: ignore[index]
        result.meta.setdefault("val", user.meta.get("val"))
        user.replace_all_uses_with(result)
        call.graph.erase_node(user)
    call.graph.erase_node(call)


def state_names(program: Program) -> tuple[str, ...]:
    """Names of the trailing ``program.state_outputs`` outputs, in order."""
    names: tuple[str, ...] = program.graph.output_node().meta[STATE_NAMES]
    return names


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
