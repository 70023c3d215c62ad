"""The skip connection of a residual add: which operand it is, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, permutations

import torch
from torch import Tensor, fx

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.ir.operators import PASSTHROUGH, operator_name, value_of

ADDS = frozenset({"add", "add_", "sub", "addcmul", "lerp", "gru_cell"})
_SCALINGS = frozenset({"mul", "div"})
_CUTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})
_COMPLEMENTS = frozenset({"rsub", "sub"})


def skip_and_region(
    flow: Dataflow, add: fx.Node, skip_of: Callable[[fx.Node], fx.Node | None], heavy_bits: int
) -> tuple[fx.Node, int]:
    """The nearest origin of an operand from which heavy operators lead to the other; an empty region without one.

    ``skip_of`` tells what an earlier residual add was added to, and is None for what is none.
    """
    operands = add.all_input_nodes[:2]
    if operator_name(add) == "addcmul":
        pairs = [(operands[0], add)]
    elif operator_name(add) == "gru_cell":
        pairs = [(operands[1], operands[0])]
    elif len(operands) == 2:
        first, second = _without_gates(*operands)
        pairs = [pair for pair in ((first, second), (second, first)) if _same_shape(pair[0], add)]
    else:
        return add, 0
    for distance in range(_FARTHEST_SKIP):
        for skip, value in pairs:
            origin = next(islice(_origins(skip, skip_of), distance, None), None)
            if origin is not None and (region := flow.region(origin, value)) & heavy_bits:
                return origin, flow.region(origin, add) if operator_name(add) == "lerp" else region
    for skip, value in pairs:
        whole = _cut_from(skip)
        if whole is not None and _passes_heavy(flow, whole, value, heavy_bits):
            return whole, flow.region(whole, value)
    return add, 0


_FARTHEST_SKIP = 16


def _cut_from(part: fx.Node) -> fx.Node | None:
    """What a part was cut from, as the halves of a reversible block are from one stream."""
    bundle = part.args[0] if operator_name(part) == "getitem" else None
    whole = bundle.args[0] if isinstance(bundle, fx.Node) and operator_name(bundle) in _CUTS else None
    return whole if isinstance(whole, fx.Node) else None


def _passes_heavy(flow: Dataflow, origin: fx.Node, value: fx.Node, heavy_bits: int) -> bool:
    """Whether every path is through heavy operators; that of a scale, to which its shift is added, is not."""
    region, seen, frontier = flow.region(origin, value), 0, [value]
    while frontier:
        node = frontier.pop()
        bit = 1 << flow.position[node]
        if node is origin:
            return False
        if bit & region & ~(seen | heavy_bits):
            seen |= bit
            frontier.extend(node.all_input_nodes)
    return bool(region & heavy_bits)


def _origins(skip: fx.Node, skip_of: Callable[[fx.Node], fx.Node | None]) -> Iterator[fx.Node]:
    """The skip itself, then what it is a cast, view or multiple of, then what earlier residual adds were added to."""
    while True:
        yield skip
        if operator_name(skip) in PASSTHROUGH and isinstance(skip.args[0], fx.Node):
            skip = skip.args[0]
        elif operator_name(skip) in _SCALINGS and (scaled := _scaled(skip)) is not None:
            skip = scaled
        elif (earlier := skip_of(skip)) is not None:
            skip = earlier
        else:
            return


def _scaled(product: fx.Node) -> fx.Node | None:
    """The factor that has the shape of a product, where the other is a constant or stretched over it."""
    factors = product.all_input_nodes[: 1 if operator_name(product) == "div" else 2]
    whole = [factor for factor in factors if _same_shape(factor, product)]
    return whole[0] if len(whole) == 1 else None


def _without_gates(first: fx.Node, second: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``x`` and ``z * f`` of ``(1 - z) * x + z * f``, in either order; other operands of an add as they are."""
    for skip, value in ((first, second), (second, first)):
        if operator_name(skip) == operator_name(value) == "mul":
            for gate, kept in permutations(skip.all_input_nodes, 2):
                if operator_name(gate) in _COMPLEMENTS and set(gate.all_input_nodes) & set(value.all_input_nodes):
                    return (kept, second) if skip is first else (first, kept)
    return first, second


def _same_shape(argument: fx.Node, add: fx.Node) -> bool:
    """Only a size of 1 is stretched by an addition, and a symbolic one is never 1, however it is written."""
    value = value_of(argument)
    if not isinstance(value, Tensor) or value.dim() != value_of(add).dim():
        return False
    pairs = zip(value.shape, value_of(add).shape, strict=True)
    return all(_is_one(a) == _is_one(b) for a, b in pairs)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
