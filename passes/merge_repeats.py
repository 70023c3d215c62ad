"""Compute once what a graph computes several times from the same values."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from lazy_compile.ir.operators import is_random, origins
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program


@dataclass(frozen=True)
class MergeRepeats(GraphPass):
    """One node for all calls of one operator with the same arguments.

    ::

        %a = aten._to_copy(%x, dtype=bfloat16)           |   %a = aten._to_copy(%x, dtype=bfloat16)
        %q = aten.linear(%a, %w_q)                       |   %q = aten.linear(%a, %w_q)
        %b = aten._to_copy(%x, dtype=bfloat16)           |
        %k = aten.linear(%b, %w_k)                       |   %k = aten.linear(%a, %w_k)

    Autocast casts an activation once for each of its readers, and models look up one table in every block. A branch
    then reads one entry where it seemed to read several. Rules:

    1. The graph is functional, so equal calls give equal values; random operators, and those that another stream of
       numbers feeds, are left alone.
    2. Results that the caller receives, and what they are views of, keep a copy of their own, so that he may write to
       them.

    Numerics are preserved bit for bit.
    """

    def apply(self, program: Program) -> bool:
        returned = {origin for node in program.graph.output_node().all_input_nodes for origin in origins(node)}
        first: dict[Hashable, fx.Node] = {}
        modified = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node in returned or is_random(node):
                continue
            call = (node.target, _key(node.args), _key(node.kwargs))
            earlier = first.setdefault(call, node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)
                program.graph.erase_node(node)
                modified = True
        return modified


def _key(argument: Any) -> Hashable:
    """Equal for equal arguments: nodes by identity, ``1`` and ``1.0`` and ``True`` apart."""
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in sorted(argument.items()))
    if isinstance(argument, float) and argument != argument:
        return (float, "nan")
    return type(argument), argument if isinstance(argument, Hashable) else id(argument)
