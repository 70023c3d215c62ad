"""Static fake quantisation as one operator: a graph keeps it whole, ONNX writes QuantizeLinear and DequantizeLinear.

Quantisation toolkits write it as a dozen operators with checks of values between them, which neither a capture nor an
engine builder can make sense of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT8_MAX = 448.0
"""The largest finite value of float8_e4m3fn."""

SMALLEST = 1.0 / (1 << 24)
"""A range up to this counts as zero, and so does what lies in it."""


@torch.library.custom_op("lazy_compile::fake_quantize", mutates_args=(), tags=(torch.Tag.pointwise,))
def fake_quantize(inputs: Tensor, amax: Tensor, lowest: int, highest: int) -> Tensor:
    """Round ``inputs`` to the values that 8 bits can hold for the range ``[-amax, amax]``, in fp32; same dtype out.

    Args:
        inputs: floating, any shape.
        amax: largest magnitude, one for the tensor or one for each channel, in a shape that broadcasts to ``inputs``.
        lowest: the integer that stands at the lower end: -127 or -128. 0 for float8_e4m3fn.
        highest: the integer that ``amax`` becomes: 127. 0 for float8_e4m3fn.
    """
    amax = amax.float()
    empty = amax <= SMALLEST
    if highest == 0:
        scale = FLOAT8_MAX / torch.where(empty, torch.ones_like(amax), amax)
        scaled = (inputs.float() * scale).clamp(-FLOAT8_MAX, FLOAT8_MAX)
        return (scaled.to(torch.float8_e4m3fn).float() * (1 / scale)).to(inputs.dtype)
    scale = torch.tensor(float(highest), device=amax.device) / amax
    steps = torch.clamp((inputs.float() * scale.masked_fill(empty, 0.0)).round_(), lowest, highest)
    return (steps / scale).to(inputs.dtype)


@fake_quantize.register_fake
def _(inputs: Tensor, amax: Tensor, lowest: int, highest: int) -> Tensor:
    return torch.empty_like(inputs)


def _keep_what_was_cut(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """The gradient passes where the value lay in the range (the straight-through estimator)."""
    values, amax = ctx.saved_tensors
    return gradient * (values.abs() <= amax), None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_keep_what_was_cut)
