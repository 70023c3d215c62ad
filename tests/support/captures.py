"""Captures of small models, and the calls that they are made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_model import capture
from lazy_compile.capture.captured import Capture
from support.layers import WIDTH


def captured_call(model: nn.Module, **arguments: Any) -> Capture:
    layout, tensors = CallLayout.of((), arguments)
    return capture(model.eval(), layout, tensors)


def accepts(found: Capture, **arguments: Tensor) -> bool:
    return found.accepts(list(arguments.values()))


def joined(batch: int, tokens: int = 16, words: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x, text = (torch.randn(batch, length, WIDTH, generator=generator) for length in (tokens, words))
    return {"x": x, "text": text, "t": torch.full((batch,), 500.0)}
