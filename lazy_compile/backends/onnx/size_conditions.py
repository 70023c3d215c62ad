"""What a captured graph holds for: the guards of its sizes, as conditions over the free sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from lazy_compile.backends.onnx.formulas import UnwritableError, is_trivial, relation
from lazy_compile.backends.onnx.sizes import names_in
from lazy_compile.runtime.lazy_graph import LazyGraph


@dataclass(frozen=True)
class SizeGuard:
    """A relation of sizes that held when a model was captured.

    Attributes:
        expression: over the symbols of the capture.
        line: of the model, which asked for it in Python; empty if torch asked.
    """

    expression: Any
    line: str

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(str(symbol) for symbol in self.expression.free_symbols)

    @property
    def counts(self) -> bool:
        """Whether the graph is another one where this does not hold.

        1. What the model asks in Python decides which graph it is.
        2. Of what torch asks on the way, equalities say which shapes go together. All else it asks to choose between
           ways to the same values: whether a tensor is contiguous, or has one element.
        """
        return bool(self.line) or _says_equal(self.expression)

    @property
    def pins(self) -> bool:
        """Whether it leaves its symbols hardly any choice: a formula of them equals a number, as a side does that a
        model compares with that of its table of positions. What is divisible by a number has a choice."""
        parts = self.expression.args
        return (
            isinstance(self.expression, sympy.Eq)
            and any(part.is_number for part in parts)
            and not any(type(part).__name__.endswith("Mod") for part in sympy.preorder_traversal(self.expression))
        )


def guards_of(graph: LazyGraph) -> list[SizeGuard]:
    """The guards of a capture that count; the model's own come first."""
    found = []
    for environment in {id(env): env for env in map(_environment, graph.captured.fake_tensors) if env}.values():
        for guard in environment.guards:
            expression = environment.replace(guard.expr).replace(_is_least, _without_multiples)
            if expression not in (sympy.true, sympy.false):
                found.append(SizeGuard(expression, _line_of_model(guard.sloc.framework_loc)))
    return sorted((guard for guard in found if guard.counts), key=lambda guard: not guard.line)


def _is_least(part: Any) -> bool:
    return type(part).__name__ == "Min"


def _without_multiples(least: Any) -> Any:
    """``min(32, 32*s)`` is 32: torch asks whether strides agree by such terms, and no size is below 1."""
    parts = [
        part
        for part in least.args
        if not any(other != part and (ratio := part / other).is_integer and ratio.is_positive for other in least.args)
    ]
    return least.func(*parts)


def pinned_symbols(guards: Collection[SizeGuard]) -> dict[str, str]:
    """Symbols of the capture that cannot be free, and the line of the model that fixes each, where it is known."""
    found: dict[str, str] = {}
    for guard in guards:
        for symbol in guard.symbols if guard.pins else ():
            found.setdefault(symbol, guard.line)
    return found


def condition_of(guard: SizeGuard, formulas: Mapping[str, Any]) -> str:
    """What a guard asks of the free sizes; empty if it asks nothing.

    Raises:
        UnwritableError: no formula says it; it names the symbols that are free.
    """
    free = {symbol for symbol in guard.symbols if symbol in formulas and formulas[symbol].free_symbols}
    if not free:
        return ""
    try:
        text = relation(guard.expression, formulas)
    except UnwritableError as error:
        raise UnwritableError(free) from error
    return "" if is_trivial(text) or not names_in(text) else text


def _environment(value: Tensor) -> Any:
    sizes: list[Any] = [size for size in value.shape if isinstance(size, torch.SymInt)]
    return sizes[0].node.shape_env if sizes else None


def _line_of_model(frame: Any) -> str:
    """``"in forward, embeddings.py:375"``; empty for code of torch, apart from its layers."""
    own = str(Path(torch.__file__).parent)
    file = getattr(frame, "filename", "")
    if not file or (file.startswith(own) and not file.startswith(f"{own}/nn/")):
        return ""
    return f"in {frame.name}, {Path(file).name}:{frame.lineno}"


def _says_equal(expression: Any) -> bool:
    if isinstance(expression, sympy.Or | sympy.And):
        return all(map(_says_equal, expression.args))
    return isinstance(expression, sympy.Eq)
