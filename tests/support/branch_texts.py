"""Graphs as text around one residual add, and what discovery makes of them."""

from __future__ import annotations

from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.program import Program
from lazy_compile.passes.discover_branches import DiscoverBranches
from support.graph_text import program

INPUTS = """
    x: f32[B, N, 8]
    s: f32[B, M, 8]
    c: f32[B, 1, 8]
    image: f32[B, 8, N, N]
    q_in: param f32[8, 8]
    k_in: param f32[8, 8]
    v_in: param f32[8, 8]
    o_in: param f32[8, 8]
    up: param f32[32, 8]
    down: param f32[8, 32]
    kernel: param f32[8, 8, 3, 3]
"""
MLP = """
    z = mul.Tensor(x, c)
    u = linear(z, up)
    a = gelu(u)
    d = linear(a, down)
"""
ATTENTION = """
    z = mul.Tensor(x, c)
    q = linear(z, q_in)
    k = linear(z, k_in)
    v = linear(z, v_in)
    a = scaled_dot_product_attention(q, k, v)
    d = linear(a, o_in)
"""


def discover(body: str, inputs: str = INPUTS, conv_branches: bool = False) -> Program:
    return DiscoverBranches(conv_branches)(program(inputs + body)).program


def bodies(found: Program) -> list[str]:
    """The tagged nodes of every branch."""
    return [
        " ".join(node.name for node in found.graph.nodes if node.meta.get(TAG) == branch.index)
        for branch in found.branches
    ]
