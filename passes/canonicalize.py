"""Bring a captured graph into one normal form by dropping what computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lazy_compile.ir.operators import operator_name, origins, value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, erase_dead

_END = 2**63 - 1


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """Remove operators that hand on their input unchanged, and checks that would pin a dtype or device.

    ::

        %slice   = aten.slice(%x, 0, 0, MAX)             |
        %clone   = aten.clone(%slice)                    |   %out = aten.linear(%x, ...)
        %div     = aten.div(%clone, 1.0)                 |
        %out     = aten.linear(%div, ...)                |

    The graph must be functional (``ExportedProgram.run_decompositions({})`` sees to that): with nothing written in
    place, a copy and its source cannot be distinguished, so the copy can go. Rules:

    1. A node is dropped if its value has the shape, dtype and device of its input and its operator is an alias, a
       plain clone, a copy to the same type, a dropout in evaluation mode, a slice or expand of everything, a squeeze
       of an axis that is not 1, a multiplication or division by one. A detach stays: gradients would flow where the
       model stops them.
    2. What is written over the whole of a tensor, ``aten.copy``, is the value itself: copies have no gradient.
    3. ``_assert_*`` nodes go: they pin what the shape guards of the capture already decide.
    4. A view becomes a reshape: a reused value may lie otherwise in memory than the one that was captured.
    5. Whatever nobody uses goes. Results that the caller receives, and what they are views of, keep their copies, so
       that he may write to them.

    Numerics are preserved bit for bit.
    """

    def apply(self, program: Program) -> bool:
        modified = False
        returned = {origin for node in program.graph.output_node().all_input_nodes for origin in origins(node)}
        for node in list(program.graph.nodes):
            if operator_name(node).startswith("_assert_"):
                program.graph.erase_node(node)
                modified = True
            elif node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default
                modified = True
            elif node in returned and operator_name(node) != "squeeze":
                continue
            elif value := _written_whole(node) or (_is_noop(node) and node.args[0]):
                assert isinstance(value, fx.Node)
                node.replace_all_uses_with(value)
                program.graph.erase_node(node)
                modified = True
        return erase_dead(program.graph) or modified


def _written_whole(node: fx.Node) -> fx.Node | None:
    """The value that a copy writes, where no reader minds how it lies in memory."""
    if operator_name(node) != "copy" or not isinstance(value := node.args[1], fx.Node):
        return None
    after, given = value_of(node), value_of(value)
    alike = (str(after.shape), after.dtype, after.device) == (str(given.shape), given.dtype, given.device)
    scattered = all(operator_name(user) in ("slice_scatter", "select_scatter") for user in node.users)
    return value if alike and (scattered or str(after.stride()) == str(given.stride())) else None


def _is_noop(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return False
    name, rest = operator_name(node), node.args[1:]
    if name == "squeeze":
        return bool(value_of(node).dim() == value_of(source).dim())  # sizes may be spelled in another way
    if not _same_description(node, source):
        return False
    if name in ("alias", "expand"):
        return True
    if name in ("clone", "_to_copy"):
        return node.kwargs.get("memory_format") in (None, torch.preserve_format)
    if name == "dropout":
        return rest[1] is False
    if name == "slice":
        return _slices_everything(node)
    if name in ("mul", "div"):
        return isinstance(rest[0], int | float) and rest[0] == 1 and "rounding_mode" not in node.kwargs
    return False


def _same_description(node: fx.Node, source: fx.Node) -> bool:
    after, before = value_of(node), value_of(source)
    return (
        isinstance(after, Tensor)
        and isinstance(before, Tensor)
        and (after.dtype, after.device) == (before.dtype, before.device)
        and (str(after.shape), str(after.stride())) == (str(before.shape), str(before.stride()))
    )


def _slices_everything(node: fx.Node) -> bool:
    start, end, step = (*node.args[2:], None, None, None)[:3]
    return start in (None, 0) and end in (None, _END) and step in (None, 1)
