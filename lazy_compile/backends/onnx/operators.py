"""A flat program as a module for the ONNX exporter, with the operators that it does not know in terms of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.flex_attention import flex_attention, math_attention
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.backends.onnx.conditionals import DOMAIN, SELECT
from lazy_compile.backends.onnx.rewrites import rewrite_of
from lazy_compile.errors import BackendError
from lazy_compile.ir.branch_arms import select
from lazy_compile.ir.fake_quantize import FLOAT8_MAX, SMALLEST, fake_quantize
from lazy_compile.ir.operators import operator_name
from lazy_compile.ir.program import Program, Role, module_state

aten = torch.ops.aten

TINY = 1e-7
"""The exporter takes an addend of less than 1e-8 for zero and drops it, as in ``x / (sum + 1e-15)``."""

CONSTANT = "Constant"
"""Stands for an addend that the exporter must not see."""

_DECOMPOSITIONS = ("linalg_qr", "linalg_svd", "_linalg_svd", "linalg_cholesky_ex", "linalg_eigh", "_linalg_eigh")
_SUMS = (aten.add.Tensor, aten.add.Scalar)
_DIFFERENCES = (aten.sub.Tensor, aten.sub.Scalar)


class Exportable(nn.Module):
    """A flat program that finds its parameters in the original model, so that they keep their names."""

    def __init__(self, original: nn.Module, program: Program) -> None:
        super().__init__()
        self.original = original
        self.program = program
        self.constants = _decomposed_weights(original, program)

    def forward(self, *inputs: Tensor) -> Any:
        users = sum(item.role is Role.USER for item in self.program.inputs)
        values = self.program.bind(module_state(self.original), inputs[:users])
        with fx.traceback.preserve_node_meta():
            results = _Tracer(self.program.graph_module, self.constants).run(*values, *inputs[users:])
        return tuple(result for result in results if isinstance(result, Tensor))


class _Tracer(fx.Interpreter):
    """Runs a flat program under export."""

    def __init__(self, module: fx.GraphModule, constants: dict[fx.Node, Any]) -> None:
        super().__init__(module)
        self.constants = constants

    def run_node(self, n: fx.Node) -> Any:
        if n in self.constants:
            return self.constants[n]
        lowering = _LOWERINGS.get(n.target) or _rewriting(n)
        if lowering is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with fx.traceback.set_current_meta(n):  # what it is lowered to belongs to the same branch
            result = lowering(n.target, *args, **kwargs)
        return super().run_node(n) if result is NotImplemented else result


def _rewriting(node: fx.Node) -> Callable[..., Any] | None:
    rewrite = rewrite_of(node)
    return None if rewrite is None else lambda _, *args, **kwargs: rewrite(*args, **kwargs)


def _decomposed_weights(original: nn.Module, program: Program) -> dict[fx.Node, Any]:
    """What factors the weights of the model have: ONNX cannot factorise a matrix."""
    factored = [node for node in program.graph.nodes if operator_name(node) in _DECOMPOSITIONS]
    if not factored:
        return {}
    flow = Dataflow(program.graph)
    needed = {item for node in factored for item in flow.members(flow.ancestors(node))}
    weights = (Role.PARAMETER, Role.BUFFER, Role.CONSTANT)
    users = [None for item in program.inputs if item.role is Role.USER]
    state = zip(program.placeholders, program.inputs, program.bind(module_state(original), users), strict=False)
    values: dict[fx.Node, Any] = {node: value for node, item, value in state if item.role in weights}
    for node in program.graph.nodes:
        if node in needed and node.op == "call_function" and all(item in values for item in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {node: values[node] for node in factored if node in values}


def _select(_: Any, condition: Tensor, computed: Tensor, reused: Tensor, conditional: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{SELECT}",
        (condition, computed, reused),
        {"conditional": conditional},
        dtype=computed.dtype,
        shape=computed.shape,
        version=1,
    )


def _add(operator: Any, value: Tensor, amount: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(amount, float) or not 0 < abs(amount) < TINY:
        return operator(value, amount, *args, **kwargs)
    hidden = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{CONSTANT}", (value,), {"value": amount}, dtype=value.dtype, shape=(), version=1
    )
    return (aten.add if operator in _SUMS else aten.sub).Tensor(value, hidden, *args, **kwargs)


def _quantize(_: Any, inputs: Tensor, amax: Tensor, lowest: int, highest: int) -> Tensor:
    """Integers saturate at -128 here, also where ``lowest`` is -127: engines know no other range."""
    dtype, largest = (torch.int8, float(highest)) if highest else (torch.float8_e4m3fn, FLOAT8_MAX)
    amax = amax.float()
    scale = (torch.where(amax <= SMALLEST, torch.ones_like(amax), amax / largest)).to(inputs.dtype)
    axes = [axis for axis, size in enumerate(scale.shape) if size != 1]
    if len(axes) > 1:
        raise BackendError("a quantiser has ranges along two axes; ONNX has one axis")
    attributes: dict[str, Any] = {"axis": axes[0] + inputs.dim() - scale.dim()} if axes else {}
    scale = scale.flatten() if axes else scale.reshape(())
    zero = torch.zeros_like(scale, dtype=dtype)
    symbolic = torch.onnx.ops.symbolic
    integers = symbolic("QuantizeLinear", (inputs, scale, zero), attributes, dtype=dtype, shape=inputs.shape)
    return symbolic("DequantizeLinear", (integers, scale, zero), attributes, dtype=inputs.dtype, shape=inputs.shape)


def _attend(
    operator: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """With exactly two axes before positions and channels, the only form that is exported; in its parts where a size
    is free, since the exporter's own parts compute shapes, which no engine does inside a branch."""
    if any(isinstance(size, torch.SymInt) for size in (*query.shape, *key.shape)):
        parts = _attention_parts(query, key, value, mask, *args, **kwargs)
        if parts is not None:
            return parts
    if query.dim() == 4:
        return operator(query, key, value, mask, *args, **kwargs)
    if mask is not None and mask.dim() > 3:
        mask = mask.expand(*query.shape[:-3], *mask.shape[-3:])
    folded = [item if item is None else _with_four_axes(item) for item in (query, key, value, mask)]
    return operator(*folded, *args, **kwargs).reshape(*query.shape[:-1], value.shape[-1])


def _attention_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Products and a softmax, each factor scaled by the root as in torch's own formula; None for what else there is.

    A query whose mask leaves it no key attends to nothing, as in torch: its softmax alone is NaN.
    """
    if dropout or is_causal or enable_gqa or not isinstance(query.shape[-1], int):
        return None
    root = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (query * root) @ (key.transpose(-2, -1) * root)
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1)
    if mask is not None:
        weights = torch.where(scores.amax(-1, keepdim=True) == float("-inf"), 0.0, weights)
    return weights @ value


def _with_four_axes(item: Tensor) -> Tensor:
    return item.reshape(-1, *[1] * (3 - item.dim()), *item.shape[-3:])


def _attend_densely(_: Any, *args: Any) -> Any:
    """As torch computes it without a compiler: blocks that a mask leaves out are computed and masked."""
    return math_attention(*args)


def _scatter(
    operator: Any, target: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A mean as a sum over a count: ONNX scatters no means, and the exporter writes the last one instead."""
    if reduce != "mean":
        scattered: Tensor = operator(target, dim, index, source, reduce, include_self=include_self)
        return scattered
    own = 1.0 if include_self else 0.0
    total = (target * own).scatter_add(dim, index, source)
    count = torch.full_like(target, own).scatter_add(dim, index, torch.ones_like(source))
    return torch.where(count > 0, total / count.clamp(min=1.0), target)


def _scatter_all(operator: Any, target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Torch leaves out what lies beyond the index; in ONNX both have one shape."""
    for axis, (size, length) in enumerate(zip(index.shape, source.shape, strict=True)):
        if not statically_known_true(size == length):
            source = source.narrow(axis, 0, size)
    scattered: Tensor = operator(target, dim, index, source)
    return scattered


def _repeat_interleave(
    operator: Any, value: Tensor, repeats: Any, dim: int | None = None, output_size: int | None = None
) -> Tensor:
    """Where the number is free, the exporter repeats along the axis beside the new one."""
    if not isinstance(repeats, torch.SymInt):
        return operator(value, repeats, dim, output_size=output_size)  # type: ignore[no-any-return]
    value, axis = (value.flatten(), 0) if dim is None else (value, dim % value.dim())
    shape = [*value.shape[: axis + 1], repeats, *value.shape[axis + 1 :]]
    return value.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)


_LOWERINGS: dict[Any, Callable[..., Any]] = {
    select._opoverload: _select,
    fake_quantize._opoverload: _quantize,
    aten.scaled_dot_product_attention.default: _attend,
    flex_attention: _attend_densely,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.scatter_reduce.two: _scatter,
    **dict.fromkeys([aten.scatter.src, aten.scatter_add.default], _scatter_all),
    **dict.fromkeys([*_SUMS, *_DIFFERENCES], _add),
}
