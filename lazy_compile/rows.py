"""Whether the rows of a batch can be computed apart: which axis holds them, and which operators mix them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.operators import CONVOLUTIONS, PRODUCTS, SDPA, SOFTMAX, operator_name, value_of
from lazy_compile.program import Program, Role

_ALONG_AXIS = SOFTMAX | frozenset(
    {
        "mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "logsumexp", "prod",
        "norm", "linalg_vector_norm", "cumsum", "cumprod", "sort", "topk", "argsort", "flip", "roll", "median", "any", "all",
        "log_softmax", "softmin",
    }
)  # fmt: skip


def batch_symbol(program: Program) -> str | None:
    """The symbolic size of the batch: axis 0 of the first output, if an input has it too. None if it is fixed."""
    outputs = [value_of(node) for node in program.graph.output_node().all_input_nodes]
    symbols = [_symbol(value.shape[0]) for value in outputs if isinstance(value, Tensor) and value.dim() > 0]
    first = symbols[0] if symbols else None
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        value = value_of(node)
        if (
            item.role is Role.USER
            and isinstance(value, Tensor)
            and value.dim() > 0
            and _symbol(value.shape[0]) == first
        ):
            return first
    return None


def batch_axis(value: Tensor, symbol: str | None) -> int | None:
    """The one axis whose size is the batch; None if there is none."""
    axes = [axis for axis, size in enumerate(value.shape) if symbol is not None and _symbol(size) == symbol]
    return axes[0] if len(axes) == 1 else None


def axis_of_size(tensor: fx.Node, size: fx.Node) -> int | None:
    """The axis of ``tensor`` whose length is the symbolic ``size``; None if no axis has it."""
    value, wanted = value_of(tensor), str(value_of(size))
    if not isinstance(value, Tensor):
        return None
    return next((axis for axis, length in enumerate(value.shape) if str(length) == wanted), None)


def why_rows_mix(
    body: Iterable[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], symbol: str | None
) -> str:
    """Empty if every row of ``outputs`` depends only on the same row of ``inputs``; else the reason."""
    if symbol is None:
        return "the batch size is fixed in this graph"
    for role, nodes in (("input", inputs), ("output", outputs)):
        for node in nodes:
            value = value_of(node)
            if isinstance(value, Tensor) and _involves(value.shape, symbol) and batch_axis(value, symbol) is None:
                return f"{role} {node.name} has its rows folded into another axis, {_describe(value.shape)}"
    for node in inputs:
        size = value_of(node)
        if isinstance(size, torch.SymInt) and _involves([size], symbol):
            if all(axis_of_size(other, node) is None for other in inputs):
                return f"the size {size} is computed from the batch outside the branch"
    for node in outputs:
        if batch_axis(value_of(node), symbol) is None:
            return f"output {node.name} has no batch axis"
    for node in body:
        if _mixes(node, symbol):
            return f"{operator_name(node)} ({node.name}) works across the rows of the batch"
    return ""


def _symbol(size: Any) -> str | None:
    return str(size) if isinstance(size, torch.SymInt) and str(size).isidentifier() else None


def _involves(sizes: Iterable[Any], symbol: str) -> bool:
    return any(isinstance(size, torch.SymInt) and symbol in map(str, size.node.expr.free_symbols) for size in sizes)


def _mixes(node: fx.Node, symbol: str) -> bool:
    name = operator_name(node)
    operands = [value for argument in node.all_input_nodes if isinstance(value := value_of(argument), Tensor)]
    if not operands:
        return False
    first = operands[0]
    if name in SDPA:
        return any(_involves(value.shape[-2:], symbol) for value in operands[:3])
    if name == "linear" or name in ("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"):
        return _involves(first.shape[-1:], symbol)
    if name in PRODUCTS and name != "einsum":
        left = operands[1] if name in ("addmm", "baddbmm") and len(operands) > 2 else first
        return _involves(left.shape[-1:], symbol)
    if name in CONVOLUTIONS:
        return _involves(first.shape[1:], symbol)
    if name in _ALONG_AXIS:
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if axes is None or axes == []:
            return _involves(first.shape, symbol)
        chosen = axes if isinstance(axes, list | tuple) else [axes]
        return any(_involves([first.shape[axis]], symbol) for axis in chosen if isinstance(axis, int))
    return False


def _describe(sizes: Iterable[Any]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"
