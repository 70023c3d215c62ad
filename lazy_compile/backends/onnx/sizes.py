"""Sizes of an exported model: numbers, and formulas over the names of those that are free.

A formula is text such as ``(height//2)*(width//2)``: whole numbers, names, ``+ - * // %``, ``min`` and ``max``. A
condition compares formulas: ``height%2 == 0``. Both stand in files, so they are read by the few rules below and never
by Python.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Any

from lazy_compile.errors import ConfigError, shown

Size = int | str
"""A number, or a formula."""

Shape = tuple[int, ...]
Sizes = Mapping[str, int]
"""The free sizes of a call by name."""


@dataclass(frozen=True)
class ShapeRange:
    """The sizes that an engine serves, by shapes of the model's own inputs: an optimization profile.

    Attributes:
        min: the smallest shapes; where it says nothing, the best.
        opt: the shapes to optimize for; where it says nothing, the largest.
        max: the largest shapes; where it says nothing, the best.
    """

    min: Mapping[str, Shape] = field(default_factory=dict)
    opt: Mapping[str, Shape] = field(default_factory=dict)
    max: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def complete(self) -> tuple[dict[str, Shape], dict[str, Shape], dict[str, Shape]]:
        """The smallest, the best and the largest shapes, each of all inputs that are named anywhere."""
        best, most = {**self.min, **self.max, **self.opt}, {**self.min, **self.opt, **self.max}
        return {**best, **self.min}, best, most


def parse_shapes(option: str, text: str) -> dict[str, Shape]:
    """``"x:1x4x32x32,t:1"``, as trtexec takes shapes, by input name; a name with a colon may stand in single quotes.

    >>> parse_shapes("--minShapes", "x:1x4x32x32,t:1")
    {'x': (1, 4, 32, 32), 't': (1,)}
    """
    shapes = {}
    for part in text.split(",") if text else ():
        quoted, _, sizes = part.strip().rpartition(":")
        name = quoted.strip("'")
        if not name or not all(size.isdecimal() and len(size) < 12 for size in sizes.split("x")):
            raise ConfigError(f"{option} {shown(part)} is not NAME:2x4x32x32; separate several by commas")
        if name in shapes:
            raise ConfigError(f"{option} has two shapes of {shown(name)}; for another profile, repeat the option")
        shapes[name] = tuple(map(int, sizes.split("x")))
    return shapes


def parse_ranges(least: Sequence[str], best: Sequence[str], most: Sequence[str]) -> tuple[ShapeRange, ...]:
    """Profiles as trtexec writes them: the first of each option belongs to the first profile, and so on."""
    given = [
        [parse_shapes(option, text) for text in texts]
        for option, texts in (("--minShapes", least), ("--optShapes", best), ("--maxShapes", most))
    ]
    return tuple(ShapeRange(*each) for each in zip_longest(*given, fillvalue={}))


def union_of(ranges: Sequence[ShapeRange]) -> ShapeRange:
    """The range that holds all of these; the best shapes are those of the first.

    Raises:
        ConfigError: two shapes of an input differ in their number of axes.
    """
    least, best, most = zip(*(each.complete for each in ranges), strict=True)
    return ShapeRange(_together(least, min), dict(best[0]), _together(most, max))


def _together(several: Sequence[Mapping[str, Shape]], choose: Callable[[Iterable[int]], int]) -> dict[str, Shape]:
    names = dict.fromkeys(name for shapes in several for name in shapes)
    alike = {name: [shapes[name] for shapes in several if name in shapes] for name in names}
    for name, shapes in alike.items():
        if len({len(shape) for shape in shapes}) > 1:
            raise ConfigError(f"the profiles have shapes of {shown(name)} of different length; give one size an axis")
    return {name: tuple(map(choose, zip(*shapes, strict=True))) for name, shapes in alike.items()}


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}

LONGEST = 1000
"""Characters of a formula or condition."""

DEEPEST = 100
"""Operations in one another."""


@lru_cache(maxsize=4096)
def parsed(text: str) -> ast.expr:
    """
    Raises:
        ValueError: it is no formula and no condition.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError("too long")
        tree = ast.parse(text, mode="eval").body
        _require_known(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{shown(text)} is no formula over sizes") from error
    return tree


def _require_known(node: ast.AST, depth: int = 0) -> None:
    if isinstance(node, ast.Constant):
        known = type(node.value) is int
    elif isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and bool(node.args) and not node.keywords
    elif isinstance(node, ast.BinOp | ast.UnaryOp):
        known = type(node.op) in _OPERATORS
    elif isinstance(node, ast.Compare):
        known = all(type(op) in _OPERATORS for op in node.ops)
    else:
        known = isinstance(node, ast.Name | ast.BoolOp)
    if not known or depth > DEEPEST:
        raise ValueError(type(node).__name__)
    for part in _operands(node):
        _require_known(part, depth + 1)


def _operands(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Call):
        return node.args
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def names_in(text: str) -> frozenset[str]:
    """The names that a formula reads."""
    calls = {node.func for node in ast.walk(parsed(text)) if isinstance(node, ast.Call)}
    return frozenset(node.id for node in ast.walk(parsed(text)) if isinstance(node, ast.Name) and node not in calls)


def value_at(size: Size, sizes: Sizes) -> int:
    """The length that a size has where the free sizes are these.

    >>> value_at("(height//2)*(width//2)", {"height": 8, "width": 6})
    12

    Raises:
        ConfigError: a free size is not known, or something is divided by zero.
    """
    if isinstance(size, int):
        return size
    try:
        return int(_value(parsed(size), sizes))
    except (KeyError, ZeroDivisionError) as error:
        raise ConfigError(
            f"size {shown(size, 60)} cannot be worked out from {shown(dict(sizes), 80)} ({shown(error)})"
        ) from error


def shape_at(shape: Sequence[Size], sizes: Sizes) -> Shape:
    return tuple(value_at(size, sizes) for size in shape)


def at_sizes(text: str, sizes: Sizes) -> Size:
    """A formula in which some names have a value; a number if none is left without.

    >>> at_sizes("(height//2)*(width//2)", {"height": 8})
    '(8//2)*(width//2)'
    """
    known = re.sub(r"[^\W\d]\w*", lambda name: str(sizes.get(name[0], name[0])), text)
    return known if names_in(known) else value_at(known, {})


def holds(condition: str, sizes: Sizes) -> bool:
    """Whether a condition holds; one that divides by zero does not."""
    try:
        return bool(_value(parsed(condition), sizes))
    except ZeroDivisionError:
        return False


def _value(node: ast.expr, sizes: Sizes) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, sizes))
    if isinstance(node, ast.BoolOp):
        parts = (_value(part, sizes) for part in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.Compare):
        values = [_value(part, sizes) for part in _operands(node)]
        return all(_OPERATORS[type(op)](*pair) for op, pair in zip(node.ops, pairwise(values), strict=True))
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return _FUNCTIONS[node.func.id](*(_value(part, sizes) for part in node.args))


def bound_sizes(declared: Mapping[str, Sequence[Size]], given: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The free sizes of a call, read from the shapes of its inputs.

    Args:
        declared: shapes as the model declares them; a free size stands alone in one of them.
        given: the shapes of the call, some of the inputs or all.

    Raises:
        ConfigError: a shape does not fit, or two contradict each other.
    """
    sizes: dict[str, int] = {}
    for name, shape in given.items():
        if len(shape) != len(declared[name]):
            raise ConfigError(_misfit(name, shape, declared[name]))
        for size, length in zip(declared[name], shape, strict=True):
            if isinstance(size, str) and size.isidentifier() and sizes.setdefault(size, length) != length:
                raise ConfigError(f"size {size!r} is {sizes[size]} in one input and {length} in {shown(name)}")
    for name, shape in given.items():
        for size, length in zip(declared[name], shape, strict=True):
            known = isinstance(size, int) or (size and names_in(size) <= sizes.keys())
            if known and value_at(size, sizes) != length:
                raise ConfigError(_misfit(name, shape, declared[name]))
    return sizes


def _misfit(name: str, seen: Sequence[int], declared: Sequence[Size]) -> str:
    return f"shape {list(seen)} of {name!r} does not fit the model, in which it is {spelled(declared)}"


def spelled(shape: Sequence[Size]) -> str:
    """``[batch, 3, height, width]``"""
    return f"[{', '.join(map(str, shape))}]"


def spelled_sizes(sizes: Sizes) -> str:
    """``batch=2, height=32``"""
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "no free size"
