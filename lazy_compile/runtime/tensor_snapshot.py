"""Whether a tensor still holds what it held at an earlier call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class TensorSnapshot:
    """A tensor as it was at a call."""

    def __init__(self, tensor: Tensor) -> None:
        self._version = None if _is_borrowed(tensor) else _version(tensor)
        self._tensor = tensor.clone() if self._version is None else tensor

    def equals(self, tensor: Tensor) -> bool:
        """Whether it has the same values; those of a tensor that was written to since are not known."""
        if self._version is not None and _version(self._tensor) != self._version:
            return False
        if tensor is self._tensor or tensor.is_meta:
            return tensor is self._tensor
        return _kind(tensor) == _kind(self._tensor) and torch.equal(tensor, self._tensor)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _is_borrowed(tensor: Tensor) -> bool:
    """Whether it lies in memory of something else, such as an array, which may write there without being counted."""
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return False
    return not tensor.untyped_storage().resizable()


def _version(tensor: Tensor) -> int | None:
    """Counts the writes to a tensor; None under inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version
