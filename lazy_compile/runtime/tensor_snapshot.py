"""Whether a tensor still holds what it held at an earlier call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MAX_COPY = 2**28
"""Bytes of a tensor that is kept to be compared; of a larger one nobody knows that it stayed the same."""

PROBED = 16
"""Elements that are compared of each weight."""


class TensorSnapshot:
    """A tensor as it was at a call. Its values are compared: not every write to a tensor is counted."""

    def __init__(self, tensor: Tensor) -> None:
        small = tensor.numel() * tensor.element_size() <= MAX_COPY
        self._copy = tensor.detach().clone() if small and not tensor.is_meta else None
        self._tensor = tensor

    def equals(self, tensor: Tensor) -> bool:
        """Whether it has the same values."""
        if tensor.is_meta:
            return tensor is self._tensor
        copy = self._copy
        return copy is not None and _kind(tensor) == _kind(copy) and torch.equal(tensor, copy)


class WeightSnapshot:
    """Weights as they were at a call: which tensors, where their memory lies, and some elements of each.

    A write through ``.data``, or in inference mode, is counted by nobody; elements at equal distances show it.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._stamps = list(map(_stamp, weights))
        self._views: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for weight in weights:
            if not weight.is_meta and weight.numel() and not is_traceable_wrapper_subclass(weight):
                view = weight.detach().view(-1) if weight.is_contiguous() else weight.detach().flatten()
                stride = max(1, weight.numel() // PROBED)
                self._views.setdefault((weight.dtype, weight.device), []).append(view[::stride][:PROBED])
        self._values = self._probe()

    def equals(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, and nobody was seen writing to them."""
        if self._stamps != list(map(_stamp, weights)):
            return False
        return all(torch.equal(now, then) for now, then in zip(self._probe(), self._values, strict=True))

    def _probe(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._views.values()]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _stamp(tensor: Tensor) -> tuple[object, ...]:
    address = 0 if tensor.is_meta or is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()
    return id(tensor), None if tensor.is_inference() else tensor._version, address
