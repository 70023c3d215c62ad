"""Find the residual branches of a model by the structure of its graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from lazy_compile.analysis.batch_rows import batch_size
from lazy_compile.analysis.branch_borders import BranchBorders, inputs_of
from lazy_compile.analysis.branch_kind import classify
from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.residual_branches import Candidate, common_path, find_candidates
from lazy_compile.ir.branch import Refusal, ResidualBranch
from lazy_compile.ir.lazy_branch import ADD, TAG
from lazy_compile.ir.operators import is_heavy, origins, value_of
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
        borders = BranchBorders.of(program)
        activations = _activations(flow, program)
        candidates: list[Candidate] = []
        for size in _sizes_of_no_stream(program):
            candidates = find_candidates(
                flow,
                batch_symbol=borders.symbol,
                batch_size=size,
                conv_branches=self.conv_branches,
                activations=activations,
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
        program.branches = tuple(
            _describe(flow, borders, candidate, index, name, activations)
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
    flow: Dataflow, borders: BranchBorders, candidate: Candidate, index: int, name: str, activations: int
) -> ResidualBranch:
    body = list(flow.members(candidate.body))
    from_skip = 0
    for skip in candidate.skips:
        from_skip |= flow.informed(skip)
    inputs = [node for node in inputs_of(body) if isinstance(value_of(node), Tensor)]
    entries = [node for node in inputs if from_skip >> flow.position[node] & 1]
    kind = classify(flow, body, entries, len(set(candidate.skips)), activations)
    return borders.describe(body, entries, index=index, name=name, kind=kind, path=candidate.path)


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
