"""Products of activations in which tokens read one another, and those in which each token is by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.row_places import Place, RowPlaces, RowsMix
from lazy_compile.analysis.row_propagation import follow
from lazy_compile.ir.operators import (
    CONVOLUTIONS,
    PASSTHROUGH,
    PRODUCTS,
    SOFTMAX,
    operator_name,
    origins,
    shape_of,
    value_of,
)

_SELECTIONS = frozenset({"index", "index_select", "embedding"})
_CHOICES = frozenset({"topk", "argmax", "sort", "argsort"})


def attending_products(
    flow: Dataflow, body: Sequence[fx.Node], entries: Sequence[fx.Node], from_entries: int, activations: int
) -> dict[fx.Node, bool]:
    """The products by which tokens read one another, and whether it is the tokens of an entry that are read.

    Those on either side of a softmax may do so along any axis, others along the longest. What is not made of the
    entries alone reads other tokens: it counts on either side of a softmax, or if the entries have no part in it.
    """
    products = [node for node in body if _is_product_of_activations(flow, node, activations)]
    if not products:
        return {}
    around_softmax = _around_softmax(flow, body, products)
    along_any, along_longest = _mixing(body, entries, _token_axes), _mixing(body, entries, _longest_token_axis)
    found = {}
    for node in products:
        own = [from_entries >> flow.position[item] & 1 for item in _factors(node)]
        if node in around_softmax:
            attends = not all(own) or node in along_any
        else:
            attends = operator_name(node) in PRODUCTS and (not any(own) or node in along_longest)
        if attends:
            found[node] = node in along_longest
    return found


def _is_product_of_activations(flow: Dataflow, node: fx.Node, activations: int) -> bool:
    """A product of two tensors that both carry activations, or of pairs of tokens (each with each, by stretching)."""
    operands = _factors(node)
    if len(operands) != 2 or not all(activations >> flow.position[_picked_from(item)] & 1 for item in operands):
        return False
    if operator_name(node) == "mul":
        return _pairs(*operands)
    return operator_name(node) in PRODUCTS and not any(map(_is_dispatch, operands))


def _factors(node: fx.Node) -> list[fx.Node]:
    """What is multiplied, without what the product is added to."""
    added_to = operator_name(node) in ("addmm", "baddbmm")
    return [item for item in node.args[1:3] if isinstance(item, fx.Node)] if added_to else node.all_input_nodes


def _pairs(first: fx.Node, second: fx.Node) -> bool:
    """Whether each of two tensors is stretched along an axis of the other."""
    a, b = shape_of(first), shape_of(second)
    if a is None or b is None or len(a) != len(b):
        return False
    stretched = [(size == 1) - (other == 1) for size, other in zip(a, b, strict=True)]
    return 1 in stretched and -1 in stretched


def _around_softmax(flow: Dataflow, body: Sequence[fx.Node], products: Sequence[fx.Node]) -> set[fx.Node]:
    """The products on either side of a softmax, without another between."""
    bits, found = flow.bits(products), set()
    for softmax in (node for node in body if operator_name(node) in SOFTMAX):
        scores = [item for item in products if (between := flow.region(item, softmax)) and not between & bits]
        if scores:
            found.update(scores)
            found.update(item for item in products if flow.region(softmax, item) & bits == 1 << flow.position[item])
    return found


def _mixing(
    body: Sequence[fx.Node], entries: Sequence[fx.Node], axes: Callable[[fx.Node], Sequence[int]]
) -> set[fx.Node]:
    """What does not keep the tokens along some axis of an entry apart, and all that is made of it."""
    found: set[fx.Node] = set() if entries else set(body)
    for entry in entries:
        for axis in axes(entry):
            found |= _mixing_along(body, entry, axis)
    return found


def _mixing_along(body: Sequence[fx.Node], entry: fx.Node, axis: int) -> set[fx.Node]:
    mixed: set[fx.Node] = set()
    try:
        length = RowPlaces("", {}).sizes(entry)[axis]
    except RowsMix:
        length = 0
    if not length:  # it is computed by division, so it cannot be told what was multiplied from it
        return set(body)
    tokens = RowPlaces("", {entry: Place(axis)}, length)
    for node in body:
        try:
            if mixed.isdisjoint(node.all_input_nodes):
                follow(tokens, node)
            else:
                mixed.add(node)
        except RowsMix:
            mixed.add(node)
    return mixed


def _token_axes(entry: fx.Node) -> list[int]:
    """All but that of the channels: the second for convolutions, the last otherwise."""
    rank = len(shape_of(entry) or ())
    channels = 1 if any(operator_name(user) in CONVOLUTIONS for user in entry.users) else rank - 1
    return [axis for axis in range(rank) if axis != channels]


def _longest_token_axis(entry: fx.Node) -> list[int]:
    shape = shape_of(entry) or ()
    return sorted(_token_axes(entry), key=lambda axis: shape[axis])[-1:]


def _picked_from(operand: fx.Node) -> fx.Node:
    """The table that an operand is a selection of, if it is one: weights of chosen experts are weights."""
    *_, source = origins(operand)
    return source.all_input_nodes[0] if operator_name(source) in _SELECTIONS else operand


def _is_dispatch(operand: fx.Node) -> bool:
    """Whether a factor is zeros and ones at chosen places, times weights: it sends tokens to experts or back."""
    frontier, seen = [operand], {operand}
    while frontier:
        node = frontier.pop()
        name, value = operator_name(node), value_of(node)
        if name in _CHOICES:
            return True
        whole_numbers = isinstance(value, Tensor) and not value.is_floating_point()
        if whole_numbers or name in PASSTHROUGH or name in ("mul", "scatter"):
            sources = [item for item in node.all_input_nodes if item not in seen]
            seen.update(sources)
            frontier.extend(sources)
    return False
