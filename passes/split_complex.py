"""Compute with pairs of real numbers what a graph computes with complex ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.ir.operators import operator_name, value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitComplex(GraphPass):
    """A last axis of real and imaginary part in place of complex numbers, which no engine knows.

    ::

        %z = aten.view_as_complex(%x)                    |   %a, %b = aten.select(%x, -1, 0), aten.select(%x, -1, 1)
        %p = aten.polar(%one, %angle)                    |   %c, %d = aten.cos(%angle), aten.sin(%angle)    (times %one)
        %r = aten.mul(%z, %p)                            |   %y = aten.stack([%a * %c - %b * %d, %a * %d + %b * %c], -1)
        %y = aten.view_as_real(%r)                       |

    Rotary embeddings are written so. Views, indexing and joining move the pair along; an operator that the pass does
    not know still reads complex numbers.

    Numerics are preserved up to rounding: a product of complex numbers may be rounded otherwise than its parts.
    """

    def apply(self, program: Program) -> bool:
        before = str(program.graph)
        pairs = _Pairs(program.graph)
        for node in list(program.graph.nodes):
            pairs.visit(node)
        if pairs.parts:
            program.graph.eliminate_dead_code()
        return str(program.graph) != before


@dataclass
class _Pairs:
    """The real form of each complex node seen so far."""

    graph: fx.Graph
    parts: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            split = all(operator_name(user) == "view_as_real" for user in node.users)
            if isinstance(value := value_of(node), Tensor) and value.is_complex() and not split:
                first = next(item for item in self.graph.nodes if item.op != "placeholder")
                with self.graph.inserting_before(first):
                    self.parts[node] = self.graph.call_function(aten.view_as_real.default, (node,))
            return
        name = operator_name(node)
        if not (name in _MAKERS or _asks_for_complex(node) or any(item in self.parts for item in node.all_input_nodes)):
            return
        with self.graph.inserting_before(node):
            if name in _ENDS:
                node.replace_all_uses_with(_ENDS[name](self, node))
            elif name in _RULES and (made := _RULES[name](self, node)) is not None:
                self.parts[node] = made
            else:
                self._hand_back(node)

    def _hand_back(self, node: fx.Node) -> None:
        """An operator without a rule reads the complex numbers again."""
        known = [item for item in node.all_input_nodes if item in self.parts]
        for argument in [item for item in known if operator_name(item) != "view_as_complex"]:
            node.replace_input_with(argument, self.call(node, aten.view_as_complex.default, self.parts[argument]))

    def call(self, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {key: value for key, value in origin.meta.items() if key != "val"}
        return made

    def halves(self, node: fx.Node, argument: Any) -> tuple[Any, Any]:
        """Real and imaginary part of a complex node; of anything real, itself and None."""
        if not isinstance(argument, fx.Node) or argument not in self.parts:
            return argument, None
        part = self.parts[argument]
        real, imaginary = (self.call(node, aten.select.int, part, -1, index) for index in (0, 1))
        return real, imaginary


def _asks_for_complex(node: fx.Node) -> bool:
    return isinstance(dtype := node.kwargs.get("dtype"), torch.dtype) and dtype.is_complex


Rule = Callable[[_Pairs, fx.Node], fx.Node | None]
"""The real form of a node; None if it has none."""


def _given(pairs: _Pairs, node: fx.Node) -> fx.Node:
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    return argument


def _complex(pairs: _Pairs, node: fx.Node) -> fx.Node:
    return pairs.call(node, aten.stack.default, list(node.args), -1)


def _polar(pairs: _Pairs, node: fx.Node) -> fx.Node:
    size, angle = node.args
    parts = (pairs.call(node, function, angle) for function in (aten.cos.default, aten.sin.default))
    scaled = [pairs.call(node, aten.mul.Tensor, size, part) for part in parts]
    return pairs.call(node, aten.stack.default, scaled, -1)


def _product(pairs: _Pairs, node: fx.Node) -> fx.Node | None:
    def times(first: Any, second: Any) -> fx.Node:
        return pairs.call(node, aten.mul.Tensor, first, second)

    if any(isinstance(argument, complex) for argument in node.args):
        return None
    (a, b), (c, d) = (pairs.halves(node, argument) for argument in node.args[:2])
    if b is None:
        real, imaginary = times(c, a), times(d, a)
    elif d is None:
        real, imaginary = times(a, c), times(b, c)
    else:
        real = pairs.call(node, aten.sub.Tensor, times(a, c), times(b, d))
        imaginary = pairs.call(node, aten.add.Tensor, times(a, d), times(b, c))
    return pairs.call(node, aten.stack.default, [real, imaginary], -1)


def _conjugate(pairs: _Pairs, node: fx.Node) -> fx.Node:
    real, imaginary = pairs.halves(node, node.args[0])
    return pairs.call(node, aten.stack.default, [real, pairs.call(node, aten.neg.default, imaginary)], -1)


def _sum(pairs: _Pairs, node: fx.Node) -> fx.Node | None:
    return _alike(pairs, node) if all(argument in pairs.parts for argument in node.args[:2]) else None


def _cast(pairs: _Pairs, node: fx.Node) -> fx.Node:
    made = _alike(pairs, node)
    if node.args[0] in pairs.parts:
        return made
    return pairs.call(node, aten.stack.default, [made, pairs.call(node, aten.zeros_like.default, made)], -1)


def _alike(pairs: _Pairs, node: fx.Node) -> fx.Node:
    """The same operator on the pairs: it reads positions of axes from the front, or none."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: pairs.parts.get(item, item))
    if _asks_for_complex(node):
        kwargs = {**kwargs, "dtype": node.kwargs["dtype"].to_real()}  # type: ignore[union-attr]
    return pairs.call(node, node.target, *args, **kwargs)


def _along(*positions: int) -> Rule:
    """The same, with the axes at these positions of the arguments counted from the front."""

    def rule(pairs: _Pairs, node: fx.Node) -> fx.Node | None:
        made = _alike(pairs, node)
        args = list(made.args)
        for position in positions:
            if position < len(args):
                axes = args[position]
                args[position] = [_axis(item) for item in axes] if isinstance(axes, list | tuple) else _axis(axes)
        made.args = tuple(args)
        return made

    return rule


def _axis(axis: Any) -> Any:
    return axis - 1 if isinstance(axis, int) and axis < 0 else axis


def _sized(last: int, position: int = 1) -> Rule:
    """The same, with one more size in the list of sizes at a position of the arguments."""

    def rule(pairs: _Pairs, node: fx.Node) -> fx.Node | None:
        sizes = node.args[position]
        if not isinstance(sizes, list | tuple):
            return None
        made = _alike(pairs, node)
        made.args = (*made.args[:position], [*sizes, last], *made.args[position + 1 :])
        return made

    return rule


def _gather(pairs: _Pairs, node: fx.Node) -> fx.Node:
    _, axis, index = node.args[:3]
    wide = pairs.call(node, aten.unsqueeze.default, index, -1)
    both = pairs.call(node, aten.expand.default, wide, [*[-1] * value_of(node).dim(), 2])
    return pairs.call(node, aten.gather.default, pairs.parts[_given(pairs, node)], _axis(axis), both)


def _padded(pairs: _Pairs, node: fx.Node) -> fx.Node | None:
    return _alike(pairs, node) if not any(node.args[2:3]) else None


def _permute(pairs: _Pairs, node: fx.Node) -> fx.Node:
    made, axes = _alike(pairs, node), node.args[1]
    assert isinstance(axes, list | tuple)
    rank = len(axes)
    made.args = (made.args[0], [*(axis % rank for axis in axes), rank])  # type: ignore[operator]
    return made


_MAKERS = frozenset({"view_as_complex", "complex", "polar"})

_ENDS: dict[str, Callable[[_Pairs, fx.Node], fx.Node]] = {
    "view_as_real": lambda pairs, node: pairs.parts[_given(pairs, node)],
    "real": lambda pairs, node: pairs.halves(node, node.args[0])[0],
    "imag": lambda pairs, node: pairs.halves(node, node.args[0])[1],
}

_RULES: dict[str, Rule] = {
    "view_as_complex": _given,
    "complex": _complex,
    "polar": _polar,
    "mul": _product,
    **dict.fromkeys(["_conj", "conj", "_conj_physical", "conj_physical"], _conjugate),
    **dict.fromkeys(["add", "sub"], _sum),
    "_to_copy": _cast,
    **dict.fromkeys(["neg", "clone", "alias", "detach", "contiguous", "index", "getitem", "copy"], _alike),
    **dict.fromkeys(["unsqueeze", "squeeze", "slice", "select", "unbind", "cat", "stack", "index_select"], _along(1)),
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "slice_scatter", "select_scatter"], _along(2)),
    "transpose": _along(1, 2),
    "permute": _permute,
    "gather": _gather,
    "pad_sequence": _padded,
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "expand", "new_zeros"], _sized(2)),
    **dict.fromkeys(["zeros", "empty"], _sized(2, position=0)),
    "repeat": _sized(1),
}
