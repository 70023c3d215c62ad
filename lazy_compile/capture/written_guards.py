"""Conditions on the sizes of a call, as torch.export writes them in Python: what is read from a file computes nothing
else."""

from __future__ import annotations

import ast

from lazy_compile.errors import ArtifactError, shown

_NODES = (
    ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Load, ast.boolop, ast.unaryop,
    ast.operator, ast.cmpop,
)  # fmt: skip
_REFUSED = (ast.LShift, ast.MatMult)
_BUILTINS = frozenset({"max", "min", "abs", "int", "float", "bool", "round"})
_MATH = frozenset({"trunc", "floor", "ceil", "sqrt", "log", "log2", "exp"})
_METHODS = frozenset({"size", "stride", "storage_offset", "dim"})
_LONGEST = 100_000
_LARGEST_EXPONENT = 16


def check_guard(text: str, where: str) -> str:
    """The same text.

    Raises:
        ArtifactError: it is not a condition on sizes, or calls something that is no arithmetic.
    """
    try:
        good = len(text) <= _LONGEST and _is_plain(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        good = False
    if not good:
        raise ArtifactError(f"{where} was refused: {shown(text, 80)} is no condition on sizes; make it again")
    return text


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float, bool) or node.value in ("tensors", "flat_args")
    if isinstance(node, ast.Name):
        return node.id == "L"
    if isinstance(node, ast.Subscript):
        return _is_plain(node.value) and _is_plain(node.slice)
    if isinstance(node, ast.Call):
        return not node.keywords and _is_arithmetic(node.func) and all(map(_is_plain, node.args))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_small(node.right):
        return False
    if isinstance(node, _REFUSED) or not isinstance(node, _NODES):
        return False
    return all(map(_is_plain, ast.iter_child_nodes(node)))


def _is_arithmetic(function: ast.AST) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _BUILTINS
    if not isinstance(function, ast.Attribute) or function.attr.startswith("_"):
        return False
    owner = function.value
    if isinstance(owner, ast.Name) and owner.id == "math":
        return function.attr in _MATH
    if isinstance(owner, ast.Name) and owner.id == "torch":
        return function.attr.startswith("sym_")
    return function.attr in _METHODS and _is_plain(owner)


def _is_small(exponent: ast.AST) -> bool:
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    value = exponent.value if isinstance(exponent, ast.Constant) else None
    return isinstance(value, int | float) and abs(value) <= _LARGEST_EXPONENT
