"""Sizes of torch's as formulas over the free sizes, in the grammar of :mod:`lazy_compile.backends.onnx.sizes`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import sympy

from lazy_compile.backends.onnx.sizes import Size, names_in
from lazy_compile.ir.operators import exact


class UnwritableError(Exception):
    """A size follows from others in a way that no formula of :mod:`lazy_compile.backends.onnx.sizes` says."""

    def __init__(self, symbols: Collection[str]) -> None:
        super().__init__(", ".join(sorted(symbols)))
        self.symbols = frozenset(symbols)


def size_symbol(name: str) -> Any:
    """A free size in formulas."""
    return sympy.Symbol(name, integer=True, positive=True)


def written(expression: Any, formulas: Mapping[str, Any]) -> Size:
    """A size of torch's as a formula.

    Args:
        expression: of sympy, with the operators that torch adds.
        formulas: what its symbols are.

    Raises:
        UnwritableError: there is none.
    """
    try:
        text = _text(_plain(exact(expression), formulas))
    except (KeyError, ValueError) as error:
        raise UnwritableError({str(symbol) for symbol in expression.free_symbols}) from error
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def note_symbol(formulas: dict[str, Any], size: Any, wanted: str) -> None:
    """Note which formula the one symbol of ``size`` stands for, where ``size`` is known to be ``wanted``."""
    form = linear(exact(size))
    if form is not None and form[0] not in formulas:
        symbol, factor, offset = form
        names = {name: size_symbol(name) for name in names_in(wanted)}
        text = sympy.sympify(wanted, locals={**names, "min": sympy.Min, "max": sympy.Max})
        formulas[symbol] = sympy.floor((text - offset) / factor)


def read_text(text: str, formulas: Mapping[str, Any]) -> Size | None:
    """A size as the exporter has written it, as a formula; None if there is none."""
    local: dict[str, Any] = {name: size_symbol(name) for name in re.findall(r"\b[a-z]\w*\b", text)}
    local |= {name: sympy.Function(name) for name in _PLAIN if name in text}
    try:
        return written(sympy.sympify(text, locals=local), formulas)
    except (UnwritableError, SyntaxError, TypeError, AttributeError, sympy.SympifyError):
        return None


def _quotient(first: Any, second: Any) -> Any:
    return sympy.floor(first / second)


_PLAIN: dict[str, Callable[..., Any]] = {
    "FloorDiv": _quotient, "CleanDiv": _quotient, "Mod": sympy.Mod, "PythonMod": sympy.Mod, "Max": sympy.Max,
    "Min": sympy.Min, "floor": sympy.floor, "ceiling": sympy.ceiling, "CeilToInt": sympy.ceiling,
    "FloorToInt": sympy.floor, "TruncToInt": sympy.floor, "IntTrueDiv": lambda first, second: first / second,
    "ToFloat": lambda value: value, "Add": sympy.Add, "Mul": sympy.Mul, "Pow": sympy.Pow,
}  # fmt: skip


def _plain(expression: Any, formulas: Mapping[str, Any]) -> Any:
    """In the functions of sympy itself, over the free sizes."""
    if expression.is_Symbol:
        return formulas[str(expression)]
    if expression.is_Rational:
        return expression
    name = type(expression).__name__
    if name not in _PLAIN:
        raise ValueError(name)
    return _PLAIN[name](*(_plain(part, formulas) for part in expression.args))


def _text(expression: Any) -> str:
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    parts = expression.args
    if expression.is_Add:
        return f"({'+'.join(sorted(map(_text, parts)))})".replace("+-", "-")
    if expression.is_Mul:
        return "*".join(sorted(map(_text, parts)))
    if expression.is_Pow and parts[1].is_Integer and parts[1] > 0:
        return "*".join([_text(parts[0])] * int(parts[1]))
    if isinstance(expression, sympy.floor | sympy.ceiling):
        above, below = map(_text, sympy.fraction(sympy.together(parts[0])))
        below = f"({below})" if "*" in below else below
        return f"({above}//{below})" if isinstance(expression, sympy.floor) else f"(-(-{above}//{below}))"
    if isinstance(expression, sympy.Mod):
        return f"({_text(parts[0])}%({_text(parts[1])}))"
    if isinstance(expression, sympy.Max | sympy.Min):
        return f"{type(expression).__name__.lower()}({', '.join(sorted(map(_text, parts)))})"
    raise ValueError(type(expression).__name__)


def linear(expression: Any) -> tuple[str, int, int] | None:
    """``(s, a, b)`` of ``a * s + b``; None for any other formula."""
    symbols = expression.free_symbols
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    factor, offset = expression.coeff(symbol, 1), expression.subs(symbol, 0)
    plain = factor.is_Integer and offset.is_Integer and factor > 0 and expression == factor * symbol + offset
    return (str(symbol), int(factor), int(offset)) if plain else None


_RELATIONS = {
    sympy.Eq: "==", sympy.Ne: "!=", sympy.StrictLessThan: "<", sympy.LessThan: "<=", sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}  # fmt: skip


def relation(expression: Any, formulas: Mapping[str, Any]) -> str:
    """A condition of torch's as one over the free sizes.

    Raises:
        UnwritableError: there is none.
    """
    if isinstance(expression, sympy.Or | sympy.And):
        word = " or " if isinstance(expression, sympy.Or) else " and "
        return f"({word.join(relation(part, formulas) for part in expression.args)})"
    if isinstance(expression, sympy.Not):
        return f"(not {relation(expression.args[0], formulas)})"
    if type(expression) not in _RELATIONS:
        raise UnwritableError({str(symbol) for symbol in expression.free_symbols})
    first, second = (written(part, formulas) for part in expression.args)
    return f"{first} {_RELATIONS[type(expression)]} {second}"


def is_trivial(text: str) -> bool:
    left, equal, right = text.partition(" == ")
    return bool(equal) and left == right
