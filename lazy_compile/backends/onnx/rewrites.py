"""Operators that ONNX, or a runtime of it, lacks, written in others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.ir.operators import CONVOLUTIONS, operator_name

aten = torch.ops.aten


def rewrite_of(node: fx.Node) -> Callable[..., Any] | None:
    """How ONNX Runtime and TensorRT know an operator; None for one that they know. What is returned takes the
    arguments of the node, and may return ``NotImplemented``.

    - An einsum becomes the permutations and products that it stands for: ONNX has none in bfloat16, TensorRT few.
    - A fold whose blocks do not overlap is a permutation: TensorRT has no ``Col2Im``.
    - The frequencies of a Fourier transform depend on a size alone: they are counted.
    - A convolution is given one padding, stride and dilation for each axis, also where all are one number.
    """
    if operator_name(node) in CONVOLUTIONS:
        return _convolution_by_axis(node.target)
    return _REWRITES.get(node.target)


def _fold(
    x: Tensor, size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Any:  # fmt: skip
    if (
        list(stride) != list(kernel)
        or any(padding)
        or any(size % step for size, step in zip(size, kernel, strict=True))
    ):
        return NotImplemented
    if any(step != 1 for step in dilation):
        return NotImplemented
    (high, wide), lead = kernel, x.shape[:-2]
    blocks = x.reshape(*lead, -1, high, wide, size[0] // high, size[1] // wide)
    axes = [*range(len(lead)), *(len(lead) + axis for axis in (0, 3, 1, 4, 2))]
    return blocks.permute(axes).reshape(*lead, -1, *size)


def _half_frequencies(n: int, d: float = 1.0, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    options = {name: value for name, value in options.items() if name == "device"}
    return torch.arange(n // 2 + 1, dtype=dtype or torch.get_default_dtype(), **options) * (1.0 / (n * d))


def _frequencies(n: int, d: float = 1.0, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    options = {name: value for name, value in options.items() if name == "device"} | {
        "dtype": dtype or torch.get_default_dtype()
    }
    whole = torch.cat([torch.arange((n - 1) // 2 + 1, **options), torch.arange(-(n // 2), 0, **options)])
    return whole * (1.0 / (n * d))


def _einsum(equation: str, operands: Sequence[Tensor], path: Sequence[int] | None = None) -> Any:
    return aten.einsum.default.decompose(equation, operands, path=path)


_REWRITES: dict[Any, Callable[..., Any]] = {
    aten.einsum.default: _einsum,
    aten.col2im.default: _fold,
    aten.fft_rfftfreq.default: _half_frequencies,
    aten.fft_fftfreq.default: _frequencies,
}


_AXIS_OPTIONS = ("stride", "padding", "dilation", "output_padding")


def _is_for_all_axes(axes: int, value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 1 < axes


def _convolution_by_axis(target: Any) -> Callable[..., Any]:
    names = [argument.name for argument in target._schema.arguments]

    def convolution(*args: Any, **kwargs: Any) -> Any:
        call = dict(zip(names, args, strict=False)) | kwargs
        axes = call["weight"].dim() - 2
        short = {name for name in _AXIS_OPTIONS if _is_for_all_axes(axes, call.get(name))}
        if not short:
            return NotImplemented
        return target(**{name: value * axes if name in short else value for name, value in call.items()})

    return convolution
