"""Symbolic sizes of a capture, and what is known of them, as values of JSON. Nothing is parsed as code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from traceback import FrameSummary
from typing import Any

import sympy
import torch
from torch._guards import ShapeGuard, SLoc
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges


class Unwritable(Exception):
    """A capture holds something that has no written form."""


_CORE = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And)
OPERATIONS = {
    kind.__name__: kind
    for kind in (
        *_CORE, sympy.Or, sympy.Not, sympy.floor, sympy.ceiling,
        *(kind for _, kind in inspect.getmembers(functions, inspect.isclass) if issubclass(kind, sympy.Function)),
        functions.Max, functions.Min,
    )
}  # fmt: skip
"""What sizes are computed by; nothing else is built from a file."""

_CONSTANTS = {"true": sympy.true, "false": sympy.false, "oo": int_oo, "-oo": -int_oo}
_LARGEST_EXPONENT = 16
_ASSUMPTIONS = ("integer", "positive", "nonnegative", "real")


class SizeWriter:
    """Writes expressions once each; whoever uses one has its number in :attr:`table`."""

    def __init__(self) -> None:
        self.table: list[Any] = []
        self._numbers: dict[sympy.Basic, int] = {}

    def number(self, expression: sympy.Basic) -> int:
        """
        Raises:
            Unwritable: it is computed by something that is not known here.
        """
        if expression not in self._numbers:
            written = _written(expression)
            self._numbers[expression] = len(self.table)
            self.table.append(written)
        return self._numbers[expression]

    def environment(self, sizes: ShapeEnv | None) -> dict[str, Any] | None:
        """What torch has learnt of the symbols: their examples and ranges, which are equal, and what it has guarded.

        Raises:
            Unwritable: there are sizes that depend on what is in a tensor.
        """
        if sizes is None:
            return None
        if sizes.unbacked_symint_counter or sizes.unbacked_symfloat_counter or sizes.deferred_runtime_asserts:
            raise Unwritable("a size depends on what is in a tensor")
        return {
            "settings": {name: bool(getattr(sizes.settings, name)) for name in _SETTINGS},
            "symbols": [
                [symbol.name, _assumptions(symbol), _written(value), *map(_written, _bounds(sizes, symbol))]
                for symbol, value in sizes.backed_var_to_val.items()
            ],
            "ids": sorted(sizes.unique_ids),
            "duck": [[int(size), self.number(symbol)] for size, symbol in sizes.val_to_var.items()],
            "replacements": [[symbol.name, self.number(value)] for symbol, value in sizes.replacements.items()],
            "divisible": [self.number(expression) for expression in sorted(sizes.divisible, key=str)],
            "axioms": [[self.number(known), self.number(value)] for known, value in sizes.axioms.items()],
            "guards": [[self.number(guard.expr), *_place(guard), guard.size_oblivious] for guard in sizes.guards],
        }


_SETTINGS = (
    "assume_static_by_default", "specialize_zero_one", "duck_shape", "prefer_deferred_runtime_asserts_over_guards",
    "trace_asserts",
)  # fmt: skip


def _written(expression: sympy.Basic) -> Any:
    for name, constant in _CONSTANTS.items():
        if expression is constant or expression == constant:
            return [name]
    if isinstance(expression, sympy.Symbol):
        return expression.name
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational):
        return ["Rational", int(expression.p), int(expression.q)]
    if isinstance(expression, sympy.Float) and math.isfinite(value := float(expression)):
        return value
    name = expression.func.__name__
    if OPERATIONS.get(name) is not expression.func:
        raise Unwritable(f"a size is computed by {name}")
    return [name, *map(_written, expression.args)]


def _assumptions(symbol: sympy.Symbol) -> list[str]:
    return [name for name in _ASSUMPTIONS if symbol.assumptions0.get(name)]


def _bounds(sizes: ShapeEnv, symbol: sympy.Symbol) -> tuple[Any, Any]:
    known = sizes.var_to_range[symbol]
    return known.lower, known.upper


def _place(guard: ShapeGuard) -> tuple[str, str, int]:
    frame = guard.sloc.framework_loc
    if not isinstance(frame, FrameSummary):
        return "", "", 0
    return frame.filename, frame.name, frame.lineno or 0


class SizeReader:
    """The opposite of a :class:`SizeWriter`: builds expressions of the known operations alone."""

    def __init__(self, table: Sequence[Any], environment: Any) -> None:
        self._symbols: dict[str, sympy.Symbol] = {}
        self.sizes = None if environment is None else self._environment(environment)
        self._expressions = [self._expression(item) for item in table]
        self._known: dict[tuple[type, int], Any] = {}

    def number(self, position: int, kind: type = int) -> Any:
        """The symbolic size, or float or bool, of an expression."""
        if (kind, position) not in self._known:
            assert self.sizes is not None
            expression = self._expressions[position]
            hint = expression.xreplace(self.sizes.backed_var_to_val)
            node: Any = SymNode(expression, self.sizes, kind, kind(hint))
            self._known[kind, position] = _SYMBOLIC[kind](node)  # type: ignore[no-untyped-call]
        return self._known[kind, position]

    def _environment(self, written: dict[str, Any]) -> ShapeEnv:
        settings: dict[str, Any] = {name: written["settings"][name] is True for name in _SETTINGS}
        sizes = ShapeEnv(**settings)
        for name, assumptions, value, lower, upper in written["symbols"]:
            if not isinstance(name, str) or not set(assumptions) <= set(_ASSUMPTIONS):
                raise ValueError(f"a symbol is {name!r}, {assumptions}")
            self._symbols[name] = symbol = sympy.Symbol(name, **dict.fromkeys(assumptions, True))
            sizes.backed_var_to_val[symbol] = self._expression(value)
            sizes.var_to_range[symbol] = ValueRanges(self._expression(lower), self._expression(upper))
            sizes.var_to_sources[symbol] = []
        return sizes

    def learn(self, written: Any) -> None:
        """Let the sizes know what is written of their environment. Last of all: it learns from whoever asks it."""
        sizes, made = self.sizes, self._expressions
        if sizes is None:
            return
        sizes.unique_ids.update(map(int, written["ids"]))
        sizes.val_to_var.update({int(size): made[position] for size, position in written["duck"]})
        sizes.replacements.update({self._symbols[name]: made[position] for name, position in written["replacements"]})
        sizes.divisible = {made[position] for position in written["divisible"]}
        sizes.axioms = {made[known]: made[value] for known, value in written["axioms"]}
        sizes.guards = []
        for position, file, name, line, oblivious in written["guards"]:
            frame = FrameSummary(str(file), int(line), str(name), lookup_line=False) if file else None
            sizes.guards.append(ShapeGuard(made[position], SLoc(frame, None), bool(oblivious)))
        sizes._update_version_counter()

    def _expression(self, written: Any) -> Any:
        if isinstance(written, str):
            return self._symbols[written]
        if type(written) is int:
            return sympy.Integer(written)
        if type(written) is float:
            return sympy.Float(written)
        name, *arguments = written
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        made = [self._expression(item) for item in arguments]
        if name == "Rational":
            return sympy.Rational(*made)
        if name == "Pow" and not (made[1].is_number and abs(made[1]) <= _LARGEST_EXPONENT):
            raise ValueError(f"a size is raised to {made[1]}")
        return OPERATIONS[name](*made, evaluate=False)  # it is what an evaluation came to


_SYMBOLIC = {int: torch.SymInt, float: torch.SymFloat, bool: torch.SymBool}
