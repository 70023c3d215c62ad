"""Which sizes of an exported model are free, what they are called, and how all other sizes follow from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

import lazy_compile.capture
from lazy_compile.analysis.batch_rows import batch_symbol
from lazy_compile.backends.onnx.metadata import BATCH, FreeSize
from lazy_compile.backends.onnx.sizes import ShapeRange, Size, bound_sizes, names_in, shape_at
from lazy_compile.errors import ConfigError
from lazy_compile.ir.operators import exact
from lazy_compile.runtime.lazy_graph import LazyGraph

Dynamic = bool | Collection[str]
"""Which sizes to leave free: all that can be, none, or those of these names."""

_LATENT_AXES = {(5, 3): ("frames", "height", "width"), (4, 2): ("height", "width"), (3, 1): ("tokens",)}
"""Names of the free axes of the latents, by their rank and the number of free axes beside the batch."""


class UnwritableError(Exception):
    """A size follows from others in a way that no formula of :mod:`lazy_compile.backends.onnx.sizes` says."""

    def __init__(self, symbols: Collection[str]) -> None:
        super().__init__(", ".join(sorted(symbols)))
        self.symbols = frozenset(symbols)


@dataclass(frozen=True)
class FreeSizes:
    """The free sizes of one capture.

    Attributes:
        example: what each of them is in the example call.
        conditions: what the graph holds for, such as ``height%2 == 0``; read from the guards of the capture.
        fixed: ``input.axis`` -> its size and the line of the model that fixes it, where the capture knows.
        formulas: what the symbols of the capture are, by name: formulas over the free sizes.
        hints: sizes to trace the export with: no size is 1, which would become fixed.
        ranges: the least and the most of each, where the user gave a range.
    """

    example: dict[str, int] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    fixed: dict[str, str] = field(default_factory=dict)
    formulas: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)

    def shape(self, value: Tensor) -> tuple[Size, ...]:
        """The sizes of a value of the captured graph."""
        return tuple(self.size(size) for size in value.shape)

    def size(self, size: int | torch.SymInt) -> Size:
        return size if isinstance(size, int) else written(size.node.expr, self.formulas)

    def described(self) -> tuple[FreeSize, ...]:
        """As the file describes them."""
        return tuple(FreeSize(name, size, *self.ranges.get(name, (0, 0))) for name, size in self.example.items())

    def traced_shapes(self, graph: LazyGraph) -> list[tuple[int, ...]]:
        """Shapes of the user's tensors to trace the export with."""
        return [shape_at(self.shape(fake), self.hints) for fake in graph.captured.fake_tensors]

    @classmethod
    def of(
        cls,
        graph: LazyGraph,
        tensors: Sequence[Tensor],
        dynamic: Dynamic,
        shapes: ShapeRange | None,
        fixed: frozenset[str],
        others: Sequence[Any],
    ) -> FreeSizes:
        """Name the free sizes of a capture.

        The rows are the ``batch``; axes of the latents are ``frames``, ``height`` and ``width``, or ``tokens``; any
        other size is named by the first input that has it and its axis, such as ``encoder_hidden_states_1``.

        Args:
            graph: the capture.
            tensors: those of the example call.
            dynamic: see :data:`Dynamic`.
            shapes: the range of sizes to serve, in the place of ``dynamic``; None for none.
            fixed: names of sizes that cannot be free for another reason.
            others: values of the graph whose sizes must follow from the free ones, such as cache slots.

        Raises:
            ConfigError: there is no free size of such a name, or the shapes do not fit.
        """
        found, held = dict(_named(graph)), _fixed(graph)
        if shapes is not None:
            declared = cls._with(graph, tensors, found, found, {}, held)
            ranges = declared._ranges(graph, shapes)
        else:
            ranges = {}
            if not isinstance(dynamic, bool):
                _require(set(dynamic), found, held)
        wanted = ranges if shapes is not None else found if isinstance(dynamic, bool) else dynamic
        kept = set(wanted if dynamic is not False or shapes is not None else ()) - fixed
        while True:
            sizes = cls._with(graph, tensors, found, kept, ranges, held)
            unwritable = set(sizes._unwritable(graph, others)) & kept
            if not unwritable:
                return sizes
            kept -= unwritable

    def _ranges(self, graph: LazyGraph, shapes: ShapeRange) -> dict[str, tuple[int, int]]:
        """The least and the most of every size that has a range."""
        declared = {
            name: tuple(size or "" for size in self._shape_or_none(fake))
            for name, fake in zip(graph.layout.names, graph.captured.fake_tensors, strict=True)
        }
        for given in shapes.complete:
            if unknown := given.keys() - declared.keys():
                raise ConfigError(f"there is no input {min(unknown)!r}; the inputs are {', '.join(declared)}")
        least, _, most = (bound_sizes(declared, given) for given in shapes.complete)
        for name, size in least.items():
            if size > most[name]:
                raise ConfigError(f"size {name!r} is {size} at least and {most[name]} at most; expected min <= max")
            if size == most[name] != self.example[name]:
                raise ConfigError(
                    f"size {name!r} is always {size}, and {self.example[name]} in the example call; give an example "
                    "call of this size"
                )
        return {name: (size, most[name]) for name, size in least.items() if size < most[name]}

    @classmethod
    def _with(
        cls,
        graph: LazyGraph,
        tensors: Sequence[Tensor],
        found: Mapping[str, _Named],
        kept: Collection[str],
        ranges: Mapping[str, tuple[int, int]],
        held: Mapping[str, str],
    ) -> FreeSizes:
        example = {name: tensors[item.position].shape[item.axis] for name, item in found.items()}
        formulas: dict[str, Any] = {}
        for name, item in found.items():
            length = _symbol(name) if name in kept else sympy.Integer(example[name])
            formulas[item.symbol] = sympy.floor((length - item.offset) / item.factor)
        hints = {name: example[name] if example[name] > 1 else found[name].hint for name in kept}
        kept_sizes = {name: example[name] for name in found if name in kept}
        sizes = cls(kept_sizes, (), dict(held), formulas, hints, dict(ranges))
        conditions = [f"{name}%{found[name].factor} == {found[name].offset}" for name in kept if found[name].factor > 1]
        conditions += _conditions(graph, formulas)
        return replace(sizes, conditions=tuple(dict.fromkeys(conditions)))

    def _shape_or_none(self, value: Tensor) -> list[Size | None]:
        result: list[Size | None] = []
        for size in value.shape:
            try:
                result.append(self.size(size))
            except UnwritableError:
                result.append(None)
        return result

    def _unwritable(self, graph: LazyGraph, others: Sequence[Any]) -> Iterator[str]:
        """Free sizes that must be fixed after all, since something follows from them that cannot be written down."""
        owners = {symbol: str(name) for symbol, formula in self.formulas.items() for name in formula.free_symbols}
        for value in filter(_is_tensor, (*graph.captured.fake_tensors, *others)):
            for size in value.shape:
                try:
                    self.size(size)
                except UnwritableError as error:
                    yield from (owners[symbol] for symbol in error.symbols if symbol in owners)
        for text in self.conditions:
            if text.startswith("?"):
                yield from text.split()[1:]


@dataclass(frozen=True)
class _Named:
    """A free size: where the example shows it, and the symbol of the capture, ``size = factor * symbol + offset``."""

    position: int
    axis: int
    symbol: str
    factor: int
    offset: int
    hint: int


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _named(graph: LazyGraph) -> Iterator[tuple[str, _Named]]:
    batch, latents, names = batch_symbol(graph.captured.program), graph.latents, graph.layout.names
    known: set[str] = set()
    taken: set[str] = set()
    fakes = graph.captured.fake_tensors
    of_latents: dict[int, str] = {}
    if latents is not None:
        fake = fakes[latents.position]
        free = [
            axis for axis, size in enumerate(_sizes(fake)) if _number(size) is None and str(size.node.expr) != batch
        ]
        of_latents = dict(zip(free, _LATENT_AXES.get((fake.dim(), len(free)), ()), strict=False))
    places = [(position, axis) for position, fake in enumerate(fakes) for axis in range(fake.dim())]
    if latents is not None:  # their names win
        places.sort(key=lambda place: place[0] != latents.position)
    for bare in (True, False):
        for position, axis in places:
            size = _sizes(fakes[position])[axis]
            linear = None if _number(size) is not None else _linear(exact(size.node.expr))
            if linear is None or (linear[1:] == (1, 0)) != bare or linear[0] in known:
                continue
            name = re.sub(r"\W", "_", f"{names[position]}_{axis}")
            if linear[0] == batch:
                name = BATCH
            elif latents is not None and position == latents.position:
                name = of_latents.get(axis, name)
            while name in taken or name in ("min", "max") or not name.isidentifier():
                name = f"{name}_" if name.isidentifier() else f"size_{name}"
            known.add(linear[0])
            taken.add(name)
            yield name, _Named(position, axis, *linear, hint=int(size.node.hint))


def _sizes(value: Tensor) -> Sequence[Any]:
    return value.shape


def _number(size: Any) -> int | None:
    """A size that is fixed; None for one that is not."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else None


def _linear(expression: Any) -> tuple[str, int, int] | None:
    """``(s, a, b)`` of ``a * s + b``; None for any other formula."""
    symbols = expression.free_symbols
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    factor, offset = expression.coeff(symbol, 1), expression.subs(symbol, 0)
    plain = factor.is_Integer and offset.is_Integer and factor > 0 and expression == factor * symbol + offset
    return (str(symbol), int(factor), int(offset)) if plain else None


def _fixed(graph: LazyGraph) -> dict[str, str]:
    lines, found = graph.captured.fixing_lines, {}
    for position, fake in enumerate(graph.captured.fake_tensors):
        for axis, size in enumerate(_sizes(fake)):
            if (length := _number(size)) is not None:
                line = lines.get((position, axis), "")
                found[f"{graph.layout.names[position]}.{axis}"] = f"{length}{f', fixed {line}' if line else ''}"
    return found


def _require(asked: set[str], found: Mapping[str, Any], held: Mapping[str, str]) -> None:
    unknown = sorted(asked - found.keys())
    if unknown:
        fixed = "; ".join(f"{name} is {why}" for name, why in held.items())
        raise ConfigError(
            f"no size {unknown[0]!r} can be left free; those that can: {', '.join(found) or 'none'}. "
            f"Fixed by the model: {fixed or 'nothing'}"
        )


# Guards ---------------------------------------------------------------------------------------------------------------


def _conditions(graph: LazyGraph, formulas: Mapping[str, Any]) -> Iterator[str]:
    """What the free sizes must satisfy, from the guards of the capture.

    1. What the model asks in Python decides which graph it is.
    2. Of what torch asks on the way, equalities say which shapes go together. All else it asks to choose between ways
       to the same values: whether a tensor is contiguous, or has one element.
    """
    for environment in {id(env): env for env in map(_environment, graph.captured.fake_tensors) if env}.values():
        for guard in environment.guards:
            expression = environment.replace(guard.expr)
            if expression in (sympy.true, sympy.false):
                continue
            if _is_of_model(guard.sloc) or _says_equal(expression):
                try:
                    text = _relation(expression, formulas)
                except (UnwritableError, ValueError, KeyError):
                    names = {str(name) for part in expression.free_symbols for name in _free_in(part, formulas)}
                    text = f"? {' '.join(sorted(names))}" if names and _is_of_model(guard.sloc) else ""
                if text and not _is_trivial(text) and (text.startswith("?") or names_in(text)):
                    yield text


def _environment(value: Tensor) -> Any:
    sizes = [size for size in _sizes(value) if isinstance(size, torch.SymInt)]
    return sizes[0].node.shape_env if sizes else None


def _free_in(symbol: Any, formulas: Mapping[str, Any]) -> Collection[Any]:
    found: Collection[Any] = formulas[str(symbol)].free_symbols if str(symbol) in formulas else ()
    return found


def _is_of_model(place: Any) -> bool:
    """Whether a guard was asked for in code of the model, to which the layers of torch belong."""
    file = str(getattr(place.maybe_user_loc or place.framework_loc, "filename", place.framework_loc))
    own = (str(Path(torch.__file__).parent), str(Path(lazy_compile.capture.__file__).parent))
    return not file.startswith(own) or file.startswith(f"{own[0]}/nn/")


def _says_equal(expression: Any) -> bool:
    if isinstance(expression, sympy.Or | sympy.And):
        return all(map(_says_equal, expression.args))
    return isinstance(expression, sympy.Eq)


_RELATIONS = {
    sympy.Eq: "==", sympy.Ne: "!=", sympy.StrictLessThan: "<", sympy.LessThan: "<=", sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}  # fmt: skip


def _relation(expression: Any, formulas: Mapping[str, Any]) -> str:
    if isinstance(expression, sympy.Or | sympy.And):
        word = " or " if isinstance(expression, sympy.Or) else " and "
        return f"({word.join(_relation(part, formulas) for part in expression.args)})"
    if isinstance(expression, sympy.Not):
        return f"(not {_relation(expression.args[0], formulas)})"
    first, second = (written(part, formulas) for part in expression.args)
    return f"{first} {_RELATIONS[type(expression)]} {second}"


def _is_trivial(text: str) -> bool:
    left, equal, right = text.partition(" == ")
    return bool(equal) and left == right


# Formulas -------------------------------------------------------------------------------------------------------------


def _symbol(name: str) -> Any:
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
    linear = _linear(exact(size))
    if linear is not None and linear[0] not in formulas:
        symbol, factor, offset = linear
        names = {name: _symbol(name) for name in names_in(wanted)}
        text = sympy.sympify(wanted, locals={**names, "min": sympy.Min, "max": sympy.Max})
        formulas[symbol] = sympy.floor((text - offset) / factor)


def read_text(text: str, formulas: Mapping[str, Any]) -> Size | None:
    """A size as the exporter has written it, as a formula; None if there is none."""
    local: dict[str, Any] = {name: _symbol(name) for name in re.findall(r"\b[a-z]\w*\b", text)}
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
