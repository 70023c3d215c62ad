"""Which sizes of an exported model are free, what they are called, and how all other sizes follow from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from lazy_compile.analysis.batch_rows import batch_symbol
from lazy_compile.backends.onnx.formulas import UnwritableError, linear, size_symbol, written
from lazy_compile.backends.onnx.metadata import BATCH, FreeSize
from lazy_compile.backends.onnx.size_conditions import SizeGuard, condition_of, guards_of, pinned_symbols
from lazy_compile.backends.onnx.sizes import ShapeRange, Size, bound_sizes, shape_at
from lazy_compile.errors import ConfigError
from lazy_compile.ir.operators import exact
from lazy_compile.runtime.lazy_graph import LazyGraph

Dynamic = bool | Collection[str]
"""Which sizes to leave free: all that can be, none, or those of these names."""

_LATENT_AXES = {(5, 3): ("frames", "height", "width"), (4, 2): ("height", "width"), (3, 1): ("tokens",)}
"""Names of the free axes of the latents, by their rank and the number of free axes beside the batch."""


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
        guards = guards_of(graph)
        found, held = dict(_named(graph)), _fixed(graph)
        free = dict(found)
        for symbol, line in pinned_symbols(guards).items():
            for name, item in found.items():
                if item.symbol == symbol:
                    place = f"{graph.layout.names[item.position]}.{item.axis}"
                    held[place] = _why(tensors[item.position].shape[item.axis], line)
                    del free[name]
        for name, reader in _read_for_values(graph, found):
            place = f"{graph.layout.names[found[name].position]}.{found[name].axis}"
            held[place] = (
                f"{tensors[found[name].position].shape[found[name].axis]}, as the model reads the values of {reader}"
            )
            free.pop(name, None)
        if shapes is not None:
            ranges = cls._with(tensors, found, free, {}, held)._ranges(graph, shapes)
        else:
            ranges = {}
            if not isinstance(dynamic, bool):
                _require(set(dynamic), free, held)
        wanted = ranges if shapes is not None else free if isinstance(dynamic, bool) else dynamic
        kept = set(wanted if dynamic is not False or shapes is not None else ()) - fixed
        while True:
            sizes = cls._with(tensors, found, kept, ranges, held)
            unwritable = set(sizes._unwritable(graph, others, guards)) & kept
            if not unwritable:
                return replace(sizes, conditions=sizes._conditions(found, guards))
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
        tensors: Sequence[Tensor],
        found: Mapping[str, _Named],
        kept: Collection[str],
        ranges: Mapping[str, tuple[int, int]],
        held: Mapping[str, str],
    ) -> FreeSizes:
        example = {name: tensors[item.position].shape[item.axis] for name, item in found.items()}
        formulas: dict[str, Any] = {}
        for name, item in found.items():
            length = size_symbol(name) if name in kept else sympy.Integer(example[name])
            formulas[item.symbol] = sympy.floor((length - item.offset) / item.factor)
        hints = {name: example[name] if example[name] > 1 else found[name].hint for name in kept}
        kept_sizes = {name: example[name] for name in found if name in kept}
        return cls(kept_sizes, (), dict(held), formulas, hints, dict(ranges))

    def _conditions(self, found: Mapping[str, _Named], guards: Sequence[SizeGuard]) -> tuple[str, ...]:
        factors = {name: found[name] for name in self.example if found[name].factor > 1}
        conditions = [f"{name}%{item.factor} == {item.offset}" for name, item in factors.items()]
        conditions += filter(None, (condition_of(guard, self.formulas) for guard in guards))
        return tuple(dict.fromkeys(conditions))

    def _shape_or_none(self, value: Tensor) -> list[Size | None]:
        result: list[Size | None] = []
        for size in value.shape:
            try:
                result.append(self.size(size))
            except UnwritableError:
                result.append(None)
        return result

    def _unwritable(self, graph: LazyGraph, others: Sequence[Any], guards: Sequence[SizeGuard]) -> Iterator[str]:
        """Free sizes that must be fixed after all, since something follows from them that cannot be written down."""
        owners = {symbol: str(name) for symbol, formula in self.formulas.items() for name in formula.free_symbols}
        values = filter(_is_tensor, (*graph.captured.fake_tensors, *others))
        checks: list[Callable[[], object]] = [partial(self.size, size) for value in values for size in value.shape]
        checks += [partial(condition_of, guard, self.formulas) for guard in guards]
        for check in checks:
            try:
                check()
            except UnwritableError as error:
                yield from (owners[symbol] for symbol in error.symbols if symbol in owners)


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
            form = None if _number(size) is not None else linear(exact(size.node.expr))
            if form is None or (form[1:] == (1, 0)) != bare or form[0] in known:
                continue
            name = re.sub(r"\W", "_", f"{names[position]}_{axis}")
            if form[0] == batch:
                name = BATCH
            elif latents is not None and position == latents.position:
                name = of_latents.get(axis, name)
            while name in taken or name in ("min", "max") or not name.isidentifier():
                name = f"{name}_" if name.isidentifier() else f"size_{name}"
            known.add(form[0])
            taken.add(name)
            yield name, _Named(position, axis, *form, hint=int(size.node.hint))


def _sizes(value: Tensor) -> Sequence[Any]:
    return value.shape


def _number(size: Any) -> int | None:
    """A size that is fixed; None for one that is not."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else None


def _fixed(graph: LazyGraph) -> dict[str, str]:
    lines, found = graph.captured.fixing_lines, {}
    for position, fake in enumerate(graph.captured.fake_tensors):
        for axis, size in enumerate(_sizes(fake)):
            if (length := _number(size)) is not None:
                line = lines.get((position, axis), "")
                found[f"{graph.layout.names[position]}.{axis}"] = _why(length, line)
    return found


def _read_for_values(graph: LazyGraph, found: Mapping[str, _Named]) -> Iterator[tuple[str, str]]:
    """Free sizes of inputs whose values decide which graph it is, and such an input: of another size its values are
    others."""
    for input_name, fake in zip(graph.layout.names, graph.captured.fake_tensors, strict=True):
        if input_name in graph.guarded_inputs:
            symbols = {
                str(symbol) for size in _sizes(fake) if _number(size) is None for symbol in size.node.expr.free_symbols
            }
            yield from ((name, input_name) for name, item in found.items() if item.symbol in symbols)


def _why(length: int, line: str) -> str:
    return f"{length}, fixed {line}" if line else str(length)


def _require(asked: set[str], found: Mapping[str, Any], held: Mapping[str, str]) -> None:
    unknown = sorted(asked - found.keys())
    if unknown:
        fixed = "; ".join(f"{name} is {why}" for name, why in held.items())
        raise ConfigError(
            f"no size {unknown[0]!r} can be left free; those that can: {', '.join(found) or 'none'}. "
            f"Fixed by the model: {fixed or 'nothing'}"
        )
