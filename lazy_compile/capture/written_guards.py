"""Sizes, and conditions on them, that files hold as Python or sympy text: what is read computes nothing else."""

from __future__ import annotations

import ast
import re

from lazy_compile.capture.written_sizes import OPERATIONS
from lazy_compile.errors import ArtifactError, shown

_NODES = (
    ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Load, ast.boolop, ast.unaryop,
    ast.operator, ast.cmpop,
)  # fmt: skip
_REFUSED = (ast.LShift, ast.MatMult)
_BUILTINS = frozenset({"max", "min", "abs", "int", "float", "bool", "round"})
_MATH = frozenset({"trunc", "floor", "ceil", "sqrt", "log", "log2", "exp"})
_METHODS = frozenset({"size", "stride", "storage_offset", "dim"})
_SYMPY = frozenset({*OPERATIONS, "Symbol", "Integer", "Rational", "Float"})
_WORDS = re.compile(r"[\w.+-]*")
_LONGEST = 100_000
_LARGEST_EXPONENT = 16


def check_guard(text: str, where: str) -> str:
    """A condition on the sizes of a call, as ``torch.export`` writes it in Python. Returns it.

    Raises:
        ArtifactError: it is none, or calls something that is no arithmetic.
    """
    return _checked(text, where, "condition on sizes", _Guard())


def check_size(text: str, where: str) -> str:
    """A symbolic size as ``sympy.srepr`` writes it, which torch has sympy evaluate. Returns it.

    Raises:
        ArtifactError: it is none, or calls something that is no arithmetic.
    """
    return _checked(text, where, "symbolic size", _Size())


def _checked(text: str, where: str, kind: str, rules: _Guard) -> str:
    try:
        good = len(text) <= _LONGEST and rules.allow(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        good = False
    if not good:
        raise ArtifactError(f"{where} was refused: {shown(text, 80)} is no {kind}; make it again")
    return text


class _Guard:
    """Numbers, sizes of ``L``, comparisons and arithmetic."""

    def allow(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return type(node.value) in (int, float, bool) or _is_word(node.value)
        if isinstance(node, ast.Name):
            return node.id == "L"
        if isinstance(node, ast.Subscript):
            return self.allow(node.value) and self.allow(node.slice)
        if isinstance(node, ast.Call):
            return self.allow_call(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_small(node.right):
            return False
        if isinstance(node, _REFUSED) or not isinstance(node, _NODES):
            return False
        return all(map(self.allow, ast.iter_child_nodes(node)))

    def allow_call(self, node: ast.Call) -> bool:
        return not node.keywords and self._is_arithmetic(node.func) and all(map(self.allow, node.args))

    def _is_arithmetic(self, function: ast.AST) -> bool:
        if isinstance(function, ast.Name):
            return function.id in _BUILTINS
        if not isinstance(function, ast.Attribute):
            return False
        owner = function.value
        if isinstance(owner, ast.Name) and owner.id == "math":
            return function.attr in _MATH
        if isinstance(owner, ast.Name) and owner.id == "torch":
            return function.attr.startswith("sym_")
        return function.attr in _METHODS and self.allow(owner)


class _Size(_Guard):
    """Operations of sympy on symbols."""

    def allow(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name | ast.Subscript):
            return isinstance(node, ast.Name) and node.id in ("true", "false", "oo", "int_oo")
        return super().allow(node)

    def allow_call(self, node: ast.Call) -> bool:
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        known = isinstance(node.func, ast.Name) and node.func.id in _SYMPY
        if known and isinstance(node.func, ast.Name) and node.func.id == "Pow" and len(arguments) > 1:
            inner = arguments[1].args[0] if isinstance(arguments[1], ast.Call) and arguments[1].args else arguments[1]
            known = _is_small(inner)
        return known and all(map(self.allow, arguments))


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORDS.fullmatch(value) is not None


def _is_small(exponent: ast.AST) -> bool:
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    value = exponent.value if isinstance(exponent, ast.Constant) else None
    return isinstance(value, int | float) and abs(value) <= _LARGEST_EXPONENT
