"""Move the body of every discovered branch into a submodule with explicit inputs and outputs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx
from torch.fx.passes.tools_common import stable_topological_sort

from lazy_compile.analysis.batch_rows import axis_of_size, batch_rows, is_measurable
from lazy_compile.analysis.branch_borders import inputs_of
from lazy_compile.analysis.folded_rows import FOLDED, insert_fold, insert_unfold, unfolded
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.operators import NUMBERS, VIEWS, operator_name, value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, Role

_NAME = "name_in_branch"
"""``node.meta[_NAME]`` is the name that an output of an outlined branch had: another branch may read it under that."""


@dataclass(frozen=True)
class OutlineBranches(GraphPass):
    """One submodule per branch.

    ::

        %q = linear(%modulated, %w_q)        [branch 0]  |   %branch_0 = branch_0(%modulated, %w_q, ..., %w_o)
        ...                                              |   %out      = getitem(%branch_0, 0)
        %o = linear(%a, %w_o)                [branch 0]  |   %gated    = mul(%gate_msa, %out)
        %gated = mul(%gate_msa, %o)                      |

    1. Inputs are every tensor that the body reads, parameters included, and what an output is relative to; outputs
       every tensor that is read outside.
    2. A size that the body reads is measured again inside, from its own inputs, so that the body also serves a part of
       the batch. Rows that are folded into an axis are taken out of it at the border.
    3. Views of weights that nobody else reads (``weight.T``) belong to the body.
    4. Nodes are put in a topological order that keeps the old one where it can. The hull is convex, so one exists.

    Numerics are preserved bit for bit.
    """

    def apply(self, program: Program) -> bool:
        members: dict[int, list[fx.Node]] = {branch.index: [] for branch in program.branches}
        for node in program.graph.nodes:
            if node.op == "call_function" and TAG in node.meta:
                members[node.meta[TAG]].append(node)
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        for branch in program.branches:
            if body := members[branch.index]:
                body = sorted([*body, *_views_of_weights(program, body)], key=order.__getitem__)
                _outline(program, branch, body)
        modified = any(members.values())
        if modified:
            stable_topological_sort(program.graph_module)
        return modified


def _views_of_weights(program: Program, body: Sequence[fx.Node]) -> list[fx.Node]:
    roles = {node: item.role for node, item in zip(program.placeholders, program.inputs, strict=True)}
    inside, found = set(body), []
    waiting = list(inputs_of(body))
    while waiting:
        node = waiting.pop()
        source = node.args[0] if operator_name(node) in VIEWS else None
        is_own = node not in inside and all(user in inside for user in node.users)
        if is_own and isinstance(source, fx.Node) and node.all_input_nodes == [source] and _is_weight(source, roles):
            inside.add(node)
            found.append(node)
            waiting.append(source)
    return found


def _is_weight(node: fx.Node, roles: Mapping[fx.Node, Role]) -> bool:
    """A parameter, a buffer or a constant, or a view of one."""
    while operator_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return roles.get(node) in (Role.PARAMETER, Role.BUFFER, Role.CONSTANT)


def _outline(program: Program, branch: ResidualBranch, body: Sequence[fx.Node]) -> None:
    inside = set(body)
    external = dict.fromkeys([*inputs_of(body), *_bases(program, branch)])
    tensors = [node for node in external if not isinstance(value_of(node), NUMBERS)]
    by_name = {node.name: node for node in body}
    outputs = [by_name[output.name] for output in branch.outputs]
    rows = batch_rows(program) if branch.row_separable else None
    folds = {node: node.meta[FOLDED] for node in [*tensors, *outputs] if rows is not None and FOLDED in node.meta}
    values = tuple(unfolded(node, folds.get(node), rows) for node in outputs)

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in tensors:
        copies[node] = graph.placeholder(node.meta.get(_NAME, node.name))
        copies[node].meta = {"val": unfolded(node, folds.get(node), rows)}
    readable = list(copies.values())
    for node in [node for node in tensors if node in folds]:
        copies[node] = insert_fold(graph, copies[node], folds[node], value_of(node))
        readable.append(copies[node])
    inputs = list(tensors)
    for size in (node for node in external if isinstance(value_of(node), NUMBERS)):
        if is_measurable(size, readable):
            _measure(graph, size, readable, copies)
        else:
            copies[size] = graph.placeholder(size.name)
            copies[size].meta = {"val": value_of(size)}
            inputs.append(size)
    _placeholders_first(graph)
    for node in body:
        copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    returned = [
        insert_unfold(graph, copies[node], folds[node], value, readable) if node in folds else copies[node]
        for node, value in zip(outputs, values, strict=True)
    ]
    graph.output(tuple(returned)).meta = {"val": values}
    name = f"branch_{branch.index}"
    program.graph_module.add_submodule(name, fx.GraphModule({}, graph))

    with program.graph.inserting_after(body[-1]):
        call = program.graph.call_module(name, tuple(inputs))
    with program.graph.inserting_before(call):
        for node in [node for node in tensors if node in folds]:
            value = unfolded(node, folds[node], rows)
            call.replace_input_with(node, insert_unfold(program.graph, node, folds[node], value, program.placeholders))
    call.meta = {"val": values, TAG: branch.index}
    after = call
    for position, (node, value) in enumerate(zip(outputs, values, strict=True)):
        with program.graph.inserting_after(after):
            result = after = program.graph.call_function(operator.getitem, (call, position))
        if node in folds:
            result.meta = {"val": value}
            with program.graph.inserting_after(after):
                result = after = insert_fold(program.graph, result, folds[node], value_of(node))
        result.meta = {key: item for key, item in node.meta.items() if key != TAG} | {_NAME: node.name}
        for user in [user for user in node.users if user not in inside]:
            user.replace_input_with(node, result)
    for node in reversed(body):
        program.graph.erase_node(node)


def _bases(program: Program, branch: ResidualBranch) -> list[fx.Node]:
    """What its outputs are relative to."""
    wanted = {output.relative_to for output in branch.outputs} - {None}
    return [node for node in program.graph.nodes if wanted and node.meta.get(_NAME, node.name) in wanted]


def _measure(graph: fx.Graph, size: fx.Node, tensors: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The size, taken from an axis of an input, or computed from sizes that are."""
    if size not in copies:
        found = next(((node, axis) for node in tensors if (axis := axis_of_size(node, size)) is not None), None)
        if found is None:
            operands = {operand: _measure(graph, operand, tensors, copies) for operand in size.all_input_nodes}
            copies[size] = graph.node_copy(size, lambda operand: operands[operand])
        else:
            copies[size] = graph.call_function(torch.ops.aten.sym_size.int, found)
            copies[size].meta = {"val": value_of(size)}
    return copies[size]


def _placeholders_first(graph: fx.Graph) -> None:
    placeholders = list(graph.find_nodes(op="placeholder"))
    for earlier, later in pairwise(placeholders):
        earlier.append(later)
