"""What happens to the tensors of a model while it is captured: each is put back where it lay, with its gradient."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@contextmanager
def tensors_left_in_place(model: nn.Module) -> Iterator[None]:
    """Put back the memory, the gradient and the gradient flag of every parameter and buffer.

    Hooks that move weights between devices exchange the memory behind a parameter; what is written into that memory is
    not undone, see :func:`values_left_alone`.
    """
    before = [_Place.of(tensor) for tensor in _plain_tensors(model)]
    try:
        yield
    finally:
        for place in before:
            place.restore()


@contextmanager
def values_left_alone(model: nn.Module) -> Iterator[None]:
    """Undo what a call of the model writes into its buffers, as running statistics are."""
    buffers = [buffer for buffer in model.buffers() if not is_traceable_wrapper_subclass(buffer)]
    before = [(buffer, buffer.detach().clone(), _version(buffer)) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values, version in before:
                if version is None or buffer._version != version:
                    buffer.copy_(values)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draw what would be drawn next, and leave the generators of torch, NumPy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and what autograd keeps with it."""

    tensor: Tensor
    memory: Tensor
    gradient: Tensor | None
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        gradient = tensor.grad if tensor.is_leaf else None
        return cls(tensor, tensor.data, gradient, tensor.requires_grad)

    def restore(self) -> None:
        if not _lies_at(self.tensor, self.memory):
            self.tensor.data = self.memory
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)
            if self.tensor.grad is not self.gradient:
                self.tensor.grad = self.gradient


def _lies_at(tensor: Tensor, memory: Tensor) -> bool:
    if (tensor.shape, tensor.dtype, tensor.device) != (memory.shape, memory.dtype, memory.device):
        return False
    return tensor.stride() == memory.stride() and tensor.data_ptr() == memory.data_ptr()


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter, nn.Buffer):
            yield tensor


def _version(tensor: Tensor) -> int | None:
    """Counts the writes to a tensor; None under inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version
