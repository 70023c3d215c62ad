"""Find the residual branches of a model by the structure of its graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lazy_compile.analysis.batch_rows import batch_axis, batch_rows, batch_size, follow_rows
from lazy_compile.analysis.branch_kind import classify
from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.folded_rows import FOLDED, follow_folded_rows, unfolded
from lazy_compile.analysis.residual_branches import Candidate, common_path, find_candidates
from lazy_compile.analysis.row_places import Place
from lazy_compile.ir.branch import BranchTensor, Refusal, ResidualBranch
from lazy_compile.ir.lazy_branch import ADD, TAG
from lazy_compile.ir.operators import (
    CONVOLUTIONS,
    is_heavy,
    macs,
    operator_name,
    origins,
    size_hint,
    size_text,
    value_of,
)
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, Role


@dataclass(frozen=True)
class DiscoverBranches(GraphPass):
    """Tag the nodes of every residual branch and describe it; nothing else is touched.

    ::

        %modulated = ...                                      entry: what the gate reads
        %q, %k, %v = linear(%modulated, ...)         [branch 0]
        %a   = scaled_dot_product_attention(...)     [branch 0]
        %o   = linear(%a, ...)                       [branch 0]   output: what is cached
        %g   = mul(%gate_msa, %o)
        %add = add(%x, %g)                                    residual add

    The body is the convex hull of a branch's heavy operators, so norms and adaLN modulation before it, and output gate,
    residual scale and post-norm behind it, run at every step. :mod:`lazy_compile.analysis.residual_branches` states
    the rule.

    Numerics are preserved: the graph is not edited.
    """

    conv_branches: bool = False

    def apply(self, program: Program) -> bool:
        before = (program.branches, program.refusals)
        flow = Dataflow(program.graph)
        rows = batch_rows(program)
        symbol = _name_of(rows)
        activations = _activations(flow, program)
        candidates: list[Candidate] = []
        for size in _sizes_of_no_stream(program):
            candidates = find_candidates(
                flow, batch_symbol=symbol, batch_size=size, conv_branches=self.conv_branches, activations=activations
            )
            accepted = sorted((c for c in candidates if not c.refusal), key=lambda c: c.heavy & -c.heavy)
            if accepted:
                break
        for index, candidate in enumerate(accepted):
            for node in flow.members(candidate.body):
                node.meta[TAG] = index
            for node in candidate.adds:
                node.meta[ADD] = index
        owners = _owners(program)
        for candidate in candidates:
            candidate.path = _path(flow, candidate.heavy, owners)
        names = _unique([candidate.path for candidate in accepted])
        folded = follow_folded_rows(program.graph, symbol)
        program.branches = tuple(
            _describe(flow, candidate, index, name, rows, activations, folded)
            for index, (candidate, name) in enumerate(zip(accepted, names, strict=True))
        )
        program.refusals = tuple(
            Refusal(candidate.adds[0].name, candidate.path, candidate.refusal)
            for candidate in candidates
            if candidate.refusal
        )
        return (program.branches, program.refusals) != before


def _sizes_of_no_stream(program: Program) -> list[str]:
    """How long a tensor of rank 2 is that is no stream: as the batch, which is true of embeddings of the time.

    A model whose output has rank 2 may have such a stream after all (one vector for each sample): where nothing else is
    found, any length will do.
    """
    output = value_of(program.graph.output_node().all_input_nodes[0])
    vectors = isinstance(output, Tensor) and output.dim() == 2
    return [batch_size(program), "1"] if vectors else [batch_size(program)]


def _describe(
    flow: Dataflow,
    candidate: Candidate,
    index: int,
    name: str,
    rows: torch.SymInt | None,
    activations: int,
    folded: Mapping[fx.Node, Place],
) -> ResidualBranch:
    body = list(flow.members(candidate.body))
    inside = set(body)
    inputs = list(dict.fromkeys(node for member in body for node in member.all_input_nodes if node not in inside))
    outputs = [node for node in body if isinstance(value_of(node), Tensor) and set(node.users) - inside]
    from_skip = 0
    for skip in candidate.skips:
        from_skip |= flow.descendants(skip)
    entries = [node for node in inputs if from_skip >> flow.position[node] & 1 and isinstance(value_of(node), Tensor)]
    reason, axes = follow_rows(body, inputs, entries, outputs, _name_of(rows), folded)
    for node, axis in axes.items():
        node.meta[FOLDED] = axis
    return ResidualBranch(
        index=index,
        name=name,
        kind=classify(flow, body, entries, len(set(candidate.skips)), activations),
        path=candidate.path,
        macs=sum(macs(node) for node in body),
        entries=tuple(_border(node, rows, _channel_axis(node, inside), axes.get(node)) for node in entries),
        outputs=tuple(_border(node, rows, -1, axes.get(node)) for node in outputs),
        row_separable=not reason,
        why_not_separable=reason,
    )


def _border(node: fx.Node, rows: torch.SymInt | None, channel_axis: int, folded_at: int | None) -> BranchTensor:
    """A tensor at the border, where rows that are folded into an axis are taken out of it."""
    value = unfolded(node, folded_at, rows)
    shape = tuple(map(size_hint, value.shape))
    if folded_at is not None and channel_axis > folded_at:
        channel_axis += 1
    size = value.element_size() * math.prod(shape)
    dtype = str(value.dtype).removeprefix("torch.")
    return BranchTensor(node.name, shape, dtype, batch_axis(value, _name_of(rows)), channel_axis, size)


def _name_of(rows: torch.SymInt | None) -> str | None:
    return None if rows is None else size_text(rows)


def _channel_axis(entry: fx.Node, inside: set[fx.Node]) -> int:
    """Channels come second where a convolution reads the entry, else last; their number is the model's."""
    readers = [user for user in entry.users if user in inside]
    if any(operator_name(user) in CONVOLUTIONS for user in readers):
        return 1
    fixed = [axis for axis, size in enumerate(value_of(entry).shape) if isinstance(size, int)]
    return fixed[-1] - value_of(entry).dim() if fixed else -1


def _activations(flow: Dataflow, program: Program) -> int:
    result = 0
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        if item.role is Role.USER:
            result |= flow.informed(node)
    return result


def _path(flow: Dataflow, heavy: int, owners: Mapping[fx.Node, str]) -> str:
    """The module that the operators lie in; where they are in none, as under autocast, that of their weights."""
    nodes = [node for node in flow.members(heavy) if is_heavy(node)]
    within = common_path([node.meta.get("module_path", "") for node in nodes])
    weights = [source for node in nodes for item in node.all_input_nodes for source in origins(item)]
    return within or common_path([owners[source] for source in weights if source in owners])


def _owners(program: Program) -> dict[fx.Node, str]:
    """The path of the module that each parameter belongs to."""
    inputs = zip(program.placeholders, program.inputs, strict=True)
    return {node: item.name.rpartition(".")[0] for node, item in inputs if item.role is Role.PARAMETER}


def _unique(paths: Sequence[str]) -> list[str]:
    """Each path once; further branches of the same path get a number, branches without one a name."""
    seen: Counter[str] = Counter()
    names = []
    for path in (path or "branch" for path in paths):
        seen[path] += 1
        names.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return names
