"""Where a captured graph attends and multiplies tokens, found without the package's own discovery."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from lazy_compile.ir.lazy_branch import lazy_calls
from lazy_compile.ir.operators import macs, size_hint
from lazy_compile.ir.program import Program, Role

aten = torch.ops.aten

_FUSED = {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "flex_attention"}
_PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm"}
_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_BETWEEN = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "expand", "clone", "_to_copy", "dropout", "mul", "div",
    "add", "sub", "where", "masked_fill", "unsqueeze", "squeeze", "slice", "contiguous", "clamp", "nan_to_num", "cat",
}  # fmt: skip


def attentions(program: Program) -> Iterator[fx.Node]:
    """Fused attention, and the second product of attention written out: product, softmax, product, or, where attention
    is linear, two products of tokens one after the other."""
    live = _depend_on_inputs(program)
    for node in program.graph.nodes:
        name = _name(node)
        if name in _FUSED:
            yield node
        elif name in _SOFTMAX and any(_name(origin) in _PRODUCTS for origin in _back(node)):
            yield from (user for user in _forth(node) if _name(user) in _PRODUCTS)
        elif _multiplies_tokens(node, live) and any(_multiplies_tokens(origin, live) for origin in _back(node)):
            yield node


def _multiplies_tokens(node: fx.Node, live: set[fx.Node]) -> bool:
    """A product of two tensors that carry activations, neither of them a matrix for each position."""
    if _name(node) not in _PRODUCTS:
        return False
    return len(operands := node.all_input_nodes) == 2 and all(item in live for item in operands)


def _depend_on_inputs(program: Program) -> set[fx.Node]:
    found = {node for node, item in zip(program.placeholders, program.inputs, strict=True) if item.role is Role.USER}
    for node in program.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def names_inside(program: Program) -> set[str]:
    """Names of the nodes in all branch bodies of a gated program."""
    return {node.name for _, branch in lazy_calls(program) for node in branch.body.graph.nodes if _name(node)}


def names_outside(program: Program) -> set[str]:
    """Names of the operators that run at every step."""
    return {node.name for node in program.graph.nodes if _name(node)}


def token_macs(program: Program, batch: int) -> dict[str, int]:
    """Multiply-accumulates by node, of the operators that work on more than one position of a sample."""
    found = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if cost := macs(node):
            value = value[0] if isinstance(value, tuple | list) else value
            assert isinstance(value, Tensor)
            positions = [size_hint(size) for size in value.shape]
            channels = 1 if "conv" in _name(node) else -1
            if prod(positions) // positions[channels] > batch:
                found[node.name] = cost
    return found


def _back(node: fx.Node) -> Iterator[fx.Node]:
    frontier, seen = list(node.all_input_nodes), set()
    while frontier:
        found = frontier.pop()
        if found not in seen:
            seen.add(found)
            yield found
            frontier += found.all_input_nodes if _name(found) in _BETWEEN else []


def _forth(node: fx.Node) -> Iterator[fx.Node]:
    frontier, seen = list(node.users), set()
    while frontier:
        found = frontier.pop()
        if found not in seen:
            seen.add(found)
            yield found
            frontier += list(found.users) if _name(found) in _BETWEEN else []


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    if isinstance(node.target, HigherOrderOperator):
        return node.target.__name__
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__) if packet is not None else ""
