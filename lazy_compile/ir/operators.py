"""What the passes know about ATen operators: which are heavy, which only pass a value on, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloatTrueDiv, FloorToInt, IntTrueDiv, ToFloat, TruncToInt
from torch.utils.flop_counter import flop_registry

from lazy_compile.ir.opaque import opaque_call
from lazy_compile.processes import groups_exchanging

aten = torch.ops.aten

SDPA = frozenset({"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"})
FUSED_ATTENTION = SDPA | {"flex_attention"}
PRODUCTS = frozenset(
    [
        *["mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "dot", "mv", "inner", "tensordot", "bilinear"],
        *["_scaled_mm", "_int_mm"],
    ]
)
RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})
CELLS = frozenset({"gru_cell", "rnn_tanh_cell", "rnn_relu_cell"})
"""One step of a recurrent network, of an input and a state."""
CONVOLUTIONS = frozenset(
    {"convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
GROUPED = frozenset({"grouped_mm", "_grouped_mm"})
HEAVY = FUSED_ATTENTION | PRODUCTS | CONVOLUTIONS | GROUPED | RECURRENT | CELLS | {"linear"}

VIEWS = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    }
)  # fmt: skip
"""Operators that lay out the same values in another way."""

PASSTHROUGH = VIEWS | {
    *["_to_copy", "to", "type_as", "alias", "clone", "contiguous", "detach", "dropout", "expand", "slice"]
}
"""Operators that hand on the same values in another shape, type or place: a skip connection is seen through them."""

SHAPE_ONLY = frozenset(
    [
        *["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"],
        *["new_zeros", "new_ones", "new_full", "new_empty"],
    ]
)
"""Operators that read how large a tensor is, and not what is in it."""

ACTIVATIONS = frozenset(
    {"gelu", "silu", "relu", "relu6", "tanh", "sigmoid", "erf", "hardswish", "mish", "leaky_relu", "elu"}
)
SOFTMAX = frozenset({"softmax", "_softmax"})


def operator_name(node: fx.Node) -> str:
    """``"linear"`` for ``aten.linear.default``; empty for what is not an operator call."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", ""))


def collective_groups(node: fx.Node) -> tuple[str, ...]:
    """The process groups in which a node exchanges tensors: a collective, or an opaque module that makes some."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    opaque = opaque_call(node)
    return tuple(groups_exchanging(node.target, node.args)) if opaque is None else opaque.groups


def origins(node: fx.Node) -> Iterator[fx.Node]:
    """The node, then what it is a cast or view of, as far back as that goes."""
    yield node
    while operator_name(node) in PASSTHROUGH and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node


def is_heavy(node: fx.Node) -> bool:
    if (opaque := opaque_call(node)) is not None:
        return opaque.macs > 0
    return (operator_name(node) in HEAVY and not _sums_nothing(node)) or is_foreign_kernel(node)


def _sums_nothing(node: fx.Node) -> bool:
    """An einsum that multiplies, and adds up over no axis, as ``bnc,bnk->bnkc`` does."""
    if operator_name(node) != "einsum":
        return False
    operands, result = einsum_axes(str(node.args[0]), [len(shape) for shape in _einsum_shapes(node)])
    return not {letter for letters in operands for letter in letters} - set(result)


def is_foreign_kernel(node: fx.Node) -> bool:
    """A kernel from outside of PyTorch (a fused attention, a selective scan): it reads two matrices or more."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in _OWN or torch.Tag.pointwise in target.tags:
        return False
    return sum(isinstance(value := value_of(item), Tensor) and value.dim() > 1 for item in node.all_input_nodes) > 1


_OWN = frozenset({"aten", "prim", "prims", "lazy_compile"})


def is_random(node: fx.Node) -> bool:
    """Whether another call with the same arguments may give other values; one that drops a share of 0 may not."""
    if operator_name(node) in ("empty", "empty_like"):
        return True
    if operator_name(node) != "dropout" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    shares = [argument_of(node, name) for name in ("dropout_p", "dropout", "p")]
    return argument_of(node, "train") is not False and all(share is None or share != 0 for share in shares)


def argument_of(node: fx.Node, name: str) -> Any:
    """An argument of an operator call by its name; its default where the call has none, None if there is no such."""
    for position, argument in enumerate(schema_of(node)):
        if argument.name == name:
            default = argument.default_value if argument.has_default_value() else None
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return None


def schema_of(node: fx.Node) -> Sequence[Any]:
    """What an operator takes; empty for what is no call of one."""
    return node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()


def is_quantiser(node: fx.Node) -> bool:
    """Readies an operand of a product for 8 bits: no work by itself, and of no use away from that product."""
    return operator_name(node) == "fake_quantize"


def value_of(node: fx.Node) -> Any:
    """The fake tensor, symbolic size or tuple that export recorded for a node."""
    return node.meta.get("val")


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape at capture, dynamic sizes by their example value; None for what is not a tensor."""
    value = value_of(node)
    return tuple(size_hint(size) for size in value.shape) if isinstance(value, Tensor) else None


def note_example_sizes(sizes: Sequence[Any], lengths: Sequence[int]) -> None:
    """Let :func:`size_hint` tell what the sizes of a capture are in the caller's example."""
    for size, length in zip(sizes, lengths, strict=True):
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
            examples = _examples(size.node.shape_env)
            examples.of_symbols[size.node.expr] = length
            examples.known.clear()


def size_hint(size: Any) -> int:
    """The value that a possibly symbolic size had in the example call; 1 if it is not known."""
    known = example_size(size)
    return 1 if known is None else known


def example_size(size: Any) -> int | None:
    """The value that a possibly symbolic size had in the example call; None for one that depends on values unseen."""
    if isinstance(size, int):
        return size
    expression, examples = size.node.expr, _examples(size.node.shape_env)
    if expression not in examples.known:
        example = expression.subs(examples.of_symbols)
        hint = int(example) if example.is_number else size.node.hint
        if hint is None:
            return None
        examples.known[expression] = int(hint)
    return examples.known[expression]


@dataclass
class _Examples:
    """Sizes in the caller's example: those of symbols, and what came of the expressions that were asked for."""

    of_symbols: dict[Any, int] = field(default_factory=dict)
    known: dict[Any, int] = field(default_factory=dict)


def _examples(shape_env: Any) -> _Examples:
    found: _Examples = shape_env.__dict__.setdefault("_lazy_compile_examples", _Examples())
    return found


NUMBERS = (torch.SymInt, torch.SymFloat)
"""What a graph computes from sizes alone."""


def size_text(size: Any) -> str:
    """``str(size)``: a number, a symbol, or how it is computed. To print an expression takes long, so it is kept."""
    return _text(size.node.expr) if isinstance(size, NUMBERS) else str(size)


@lru_cache(maxsize=1 << 14)
def _text(expression: Any) -> str:
    return str(exact(expression))


def exact(expression: Any) -> Any:
    """A size in whole numbers and fractions, where the model divides with rounding: ``int(4 * n / 4.0)`` is ``n``.

    Floating point divides without error where nothing is left; where something is, sizes are not compared any closer.
    A quotient of whole numbers is rounded alike whatever they have in common, so ``n * m / (n * 3)`` is ``m / 3``.
    """
    if expression.has(TruncToInt, FloorToInt):
        expression = expression.replace(
            lambda part: isinstance(part, TruncToInt | FloorToInt), lambda part: sympy.floor(_fraction(part.args[0]))
        )
    if expression.has(FloatTrueDiv, IntTrueDiv):
        expression = expression.replace(_divides_whole_numbers, _fraction)
    return expression


def _divides_whole_numbers(part: Any) -> bool:
    return isinstance(part, FloatTrueDiv | IntTrueDiv) and not any(
        argument.has(FloatTrueDiv, IntTrueDiv, sympy.Float) for argument in part.args
    )


def _fraction(expression: Any) -> Any:
    if isinstance(expression, FloatTrueDiv | IntTrueDiv):
        return _fraction(expression.args[0]) / _fraction(expression.args[1])
    if isinstance(expression, ToFloat):
        return expression.args[0]
    if expression.is_Float and float(expression).is_integer():
        return sympy.Integer(int(expression))
    return expression.func(*map(_fraction, expression.args)) if expression.is_Mul else expression


@lru_cache(maxsize=1 << 14)
def symbols_of(expression: Any) -> frozenset[str]:
    """The names of the symbols that an expression is computed from."""
    return frozenset(map(str, exact(expression).free_symbols))


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of one call at the captured shape; 0 for operators that are not heavy.

    A kernel from outside of PyTorch costs what its formula in ``torch.utils.flop_counter`` says, and 0 without one.
    """
    if (opaque := opaque_call(node)) is not None:
        return opaque.macs
    if is_foreign_kernel(node):
        return _registered_macs(node) if has_formula(node) else 0
    return _MACS.get(operator_name(node), _product_macs)(node) if is_heavy(node) else 0


def has_formula(node: fx.Node) -> bool:
    """Whether somebody has said what a kernel costs, by ``torch.utils.flop_counter.register_flop_formula``."""
    return is_foreign_kernel(node) and node.target.overloadpacket in flop_registry  # type: ignore[union-attr]


def _registered_macs(node: fx.Node) -> int:
    def stand_in(argument: fx.Node) -> Any:
        value = value_of(argument)
        if isinstance(value, Tensor):
            return torch.empty(shape_of(argument) or (), dtype=value.dtype, device="meta")
        return size_hint(value) if isinstance(value, torch.SymInt) else value

    formula = flop_registry[node.target.overloadpacket]  # type: ignore[union-attr]
    args, kwargs = fx.map_arg((node.args, node.kwargs), stand_in)
    return int(formula(*args, **kwargs, out_val=stand_in(node))) // 2


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [shape for argument in node.all_input_nodes if (shape := shape_of(argument)) is not None]


def _linear_macs(node: fx.Node) -> int:
    return math.prod(shape_of(node) or ()) * (_operand_shape(node, 0) or (0,))[-1]


def _product_macs(node: fx.Node) -> int:
    left, right = (0, 1) if operator_name(node) not in ("addmm", "baddbmm") else (1, 2)
    lhs, rhs = _operand_shape(node, left), _operand_shape(node, right)
    output = shape_of(node)
    if lhs is None or rhs is None or output is None:
        return 0
    return math.prod(output) * lhs[-1]


def _einsum_macs(node: fx.Node) -> int:
    shapes = _einsum_shapes(node)
    sizes: dict[str, int] = {}
    for axes, shape in zip(einsum_axes(str(node.args[0]), list(map(len, shapes)))[0], shapes, strict=True):
        for letter, size in zip(axes, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def _einsum_shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """Of each operand; one that is read twice counts twice."""
    operands = cast(Sequence[fx.Node], node.args[1])
    return [shape_of(operand) or () for operand in operands]


def einsum_axes(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The letters of each operand's axes and of the result's; what ``...`` stands for is counted from the right.

    Without an arrow the result has what ``...`` stands for, then the letters that occur once, in their order.
    """
    sides, arrow, result = equation.replace(" ", "").partition("->")
    operands, spread = [], 0
    for letters, rank in zip(sides.split(","), ranks, strict=True):
        head, dots, tail = letters.partition("...")
        hidden = rank - len(head) - len(tail) if dots else 0
        spread = max(spread, hidden)
        operands.append([*head, *(f"...{axis}" for axis in reversed(range(hidden))), *tail])
    if not arrow:
        letters = sides.replace(".", "").replace(",", "")
        result = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    head, dots, tail = result.partition("...")
    return operands, [*head, *(f"...{axis}" for axis in reversed(range(spread if dots else 0))), *tail]


def _attention_macs(node: fx.Node) -> int:
    query, key, value = (_operand_shape(node, position) or (0, 0) for position in range(3))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution_macs(node: fx.Node) -> int:
    weight, output = _operand_shape(node, 1), shape_of(node)
    if weight is None or output is None:
        return 0
    if operator_name(node).startswith("conv_transpose"):
        return math.prod(_operand_shape(node, 0) or (0,)) * math.prod(weight[1:])
    return math.prod(output) * math.prod(weight[1:])


def _operand_shape(node: fx.Node, position: int) -> tuple[int, ...] | None:
    argument = node.args[position] if position < len(node.args) else None
    return shape_of(argument) if isinstance(argument, fx.Node) else None


def _bilinear_macs(node: fx.Node) -> int:
    return math.prod(shape_of(node) or ()) * math.prod((_operand_shape(node, 2) or (0, 0, 0))[1:])


def _tensordot_macs(node: fx.Node) -> int:
    left, summed = _operand_shape(node, 0) or (), cast(Sequence[int], node.args[2])
    return math.prod(shape_of(node) or ()) * math.prod(left[axis] for axis in summed)


def _recurrent_macs(node: fx.Node) -> int:
    """Every matrix of every layer, once for each token."""
    weights = [shape for shape in _shapes(node)[1:] if len(shape) == 2]
    return math.prod((_operand_shape(node, 0) or (0,))[:-1]) * sum(map(math.prod, weights))


def _cell_macs(node: fx.Node) -> int:
    """The matrix of the input and that of the state, once for each line."""
    lines = math.prod((_operand_shape(node, 0) or (0,))[:-1])
    return lines * sum(math.prod(_operand_shape(node, position) or ()) for position in (2, 3))


_MACS: dict[str, Callable[[fx.Node], int]] = {
    "bilinear": _bilinear_macs,
    "tensordot": _tensordot_macs,
    **dict.fromkeys(RECURRENT, _recurrent_macs),
    **dict.fromkeys(CELLS, _cell_macs),
    "linear": _linear_macs,
    "einsum": _einsum_macs,
    **dict.fromkeys(FUSED_ATTENTION, _attention_macs),
    **dict.fromkeys(CONVOLUTIONS, _convolution_macs),
}


def is_spatial_convolution(node: fx.Node) -> bool:
    """A convolution over more than one position, of channels together or each alone."""
    weight = _operand_shape(node, 1) if operator_name(node) in CONVOLUTIONS else None
    return weight is not None and math.prod(weight[2:]) > 1


def is_dense_convolution(node: fx.Node) -> bool:
    """A convolution that mixes channels over more than one position; pointwise and depthwise ones are token MLPs."""
    weight = _operand_shape(node, 1)
    return is_spatial_convolution(node) and weight is not None and weight[1] > 1
