"""Residual branches without a graph."""

from __future__ import annotations

from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch


def branch(index: int, features: int = 2) -> ResidualBranch:
    entry = BranchTensor("e", (3, 4, features), "float32", 0, -1, 96)
    return ResidualBranch(index, f"b{index}", BranchKind.MLP, "", 1, (entry,), (), True)
