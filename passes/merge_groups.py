"""Let one conditional hold all the branches that share a decision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.ir.lazy_branch import ADD, TAG
from lazy_compile.ir.operators import is_heavy
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program

SELECT = torch.ops.lazy_compile.select.default

Run = dict[int, list[fx.Node]]
"""The selects of consecutive branches, by branch."""


@dataclass(frozen=True)
class MergeGroups(GraphPass):
    """Give the selects of a group one number, and copy what lies between its branches into both arms.

    ::

        %a = linear(%x, ...)                     [branch 0]  |  %a  = linear(%x, ...)                    [branch 0]
        %s = select(%compute, %a, %cache_0, 0)               |  %s  = select(%compute, %a, %cache_0, 0)
        %y = add(%x, %s)                                     |  %y  = add(%x, %a)
        %b = linear(%y, ...)                     [branch 1]  |  %y' = add(%x, %cache_0)
        %t = select(%compute, %b, %cache_1, 1)               |  %b  = linear(%y, ...)                    [branch 1]
        %z = add(%y, %t)                                     |  %t  = select(%compute, %b, %cache_1, 0)
        return (%z, %s, %t)                                  |  %z  = add(%y, %b)
                                                             |  %z' = add(%y', %cache_1)
                                                             |  %z" = select(%compute, %z, %z', 0)
                                                             |  return (%z", %s, %t)

    1. Branches form a group if their selects have one condition. The number of the group is its first branch.
    2. *Glue* is what lies on a path from one branch of the group to another, or from one to its residual add, that add
       included. Each of its nodes is there twice afterwards, on what was computed and on what is reused; where others
       read it, they read a select.
    3. Glue that holds a heavy operator, or a branch of another group, stays as it is: a new group begins behind it.

    Numerics are preserved bit for bit.
    """

    def apply(self, program: Program) -> bool:
        groups: dict[Any, Run] = defaultdict(dict)
        for node in program.graph.find_nodes(op="call_function", target=SELECT):
            groups[node.args[0]].setdefault(node.args[3], []).append(node)
        if all(len(run) == 1 for run in groups.values()):
            return False
        flow = Dataflow(program.graph)
        runs = [(run, glue) for group in groups.values() for run, glue in _runs(flow, group) if len(run) > 1]
        for run, glue in runs:
            _merge(program.graph, run, glue)
        return bool(runs)


def _runs(flow: Dataflow, group: Run) -> Iterator[tuple[Run, list[fx.Node]]]:
    """Parts of a group between which there is no heavy glue, and what lies inside each."""
    run: Run = {}
    for branch, selects in group.items():
        if run and _glue(flow, {**run, branch: selects}, adds=False) is None:
            yield run, _glue(flow, run, adds=True) or _glue(flow, run, adds=False) or []
            run = {}
        run[branch] = selects
    yield run, _glue(flow, run, adds=True) or _glue(flow, run, adds=False) or []


def _glue(flow: Dataflow, run: Run, adds: bool) -> list[fx.Node] | None:
    """Everything between the branches of a run, bodies and selects included, in order; None if it may not be copied."""
    selects = [node for nodes in run.values() for node in nodes]
    ends = selects + [node for node in flow.nodes if adds and node.meta.get(ADD) in run]
    below = above = 0
    for node in selects:
        below |= flow.descendants(node)
    for node in ends:
        above |= flow.ancestors(node)
    between = list(flow.members(below & above))
    for node in between:
        branch = node.args[3] if node.target is SELECT else node.meta.get(TAG)
        if branch not in (None, *run) or (branch is None and is_heavy(node)):
            return None
    return between


def _merge(graph: fx.Graph, run: Run, between: Sequence[fx.Node]) -> None:
    number, condition = next(iter(run)), next(iter(run.values()))[0].args[0]
    selects = [node for nodes in run.values() for node in nodes]
    inside = set(between)
    computed: dict[Any, Any] = {node: node.args[1] for node in selects}
    reused: dict[Any, Any] = {node: node.args[2] for node in selects}
    copies: list[fx.Node] = []
    for node in between:
        if node in reused:
            reused[node] = reused.get(node.args[2], node.args[2])
            continue
        if _belongs_to_a_body(node, inside, reused):
            _read(node, computed)
            continue
        copy = graph.node_copy(node, lambda argument: reused.get(argument, argument))
        node.append(copy)
        copies.append(copy)
        reused[node], computed[node] = copy, node
        readers = [user for user in node.users if user not in inside]
        _read(node, computed)
        if readers:
            with graph.inserting_after(copy):
                choice = graph.call_function(SELECT, (condition, node, copy, number))
            choice.meta["val"] = node.meta.get("val")
            for reader in readers:
                reader.replace_input_with(node, choice)
    for select in selects:
        _, computing, reusing, _ = select.args
        select.args = (condition, computed.get(computing, computing), reused.get(reusing, reusing), number)
    for copy in reversed(copies):
        if not copy.users:
            graph.erase_node(copy)


def _belongs_to_a_body(node: fx.Node, inside: set[fx.Node], reused: Mapping[fx.Node, Any]) -> bool:
    """Whether a node is needed only where the group computes: a body, or what is made of a body's own results."""
    if TAG in node.meta:
        return True
    return any(argument in inside and argument not in reused for argument in node.all_input_nodes)


def _read(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    for argument in node.all_input_nodes:
        if argument in values:
            node.replace_input_with(argument, values[argument])
