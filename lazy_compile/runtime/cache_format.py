"""In which type and where caches are kept: as they are, in fewer bits, or in the memory of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazy_compile.config import LazyConfig
from lazy_compile.ir.branch import BranchTensor, ResidualBranch

Values = tuple[Tensor, ...]


@dataclass(frozen=True)
class CacheFormat:
    """How a cache slot holds the outputs of a branch.

    A type of 8 bits comes with a scale for each row of the batch, so that its largest number is used: the scales follow
    the outputs in the same tuple. Such numbers are held as bytes, which every operator copies.

    Attributes:
        dtype: of floating tensors; None leaves them.
        device: where they lie; None leaves them where they are.
    """

    dtype: torch.dtype | None = None
    device: str | None = None

    @classmethod
    def of(cls, config: LazyConfig) -> CacheFormat:
        dtype = None if config.cache_dtype is None else getattr(torch, config.cache_dtype)
        return cls(dtype, config.cache_device)

    @property
    def has_scales(self) -> bool:
        return self.dtype is not None and self.dtype.itemsize == 1

    def row_axes(self, branch: ResidualBranch) -> list[int]:
        """For each tensor of a slot the axis of its rows."""
        axes = [output.batch_axis or 0 for output in branch.outputs]
        return axes + [0] * len(axes) if self.has_scales else axes

    def bytes(self, branch: ResidualBranch) -> int:
        """What one kept value of a branch takes, at the captured sizes."""
        return sum(map(self._bytes, branch.outputs))

    def store(self, values: Sequence[Tensor], branch: ResidualBranch) -> Values:
        """Outputs as a slot holds them."""
        if self.dtype is None and self.device is None:
            return tuple(values)
        if not self.has_scales:
            return tuple(self._moved(value.to(self.dtype) if _is_real(value) else value) for value in values)
        pairs = [self._scaled(value, output) for value, output in zip(values, branch.outputs, strict=True)]
        return tuple(self._moved(part) for parts in zip(*pairs, strict=True) for part in parts)

    def load(self, stored: Values, branch: ResidualBranch, device: torch.device) -> Values:
        """Outputs as the branch made them, but for rounding."""
        if self.dtype is None and self.device is None:
            return stored
        result = []
        for position, output in enumerate(branch.outputs):
            value = stored[position].to(device, non_blocking=True)
            dtype = getattr(torch, output.dtype)
            if self.dtype is not None and self.has_scales and dtype.is_floating_point:
                scale = stored[len(branch.outputs) + position].to(device, non_blocking=True)
                value = (value.view(self.dtype).to(torch.float32) * _along(scale, value, output)).to(dtype)
            result.append(value.to(dtype))
        return tuple(result)

    def _scaled(self, value: Tensor, output: BranchTensor) -> tuple[Tensor, Tensor]:
        rows = 1 if output.batch_axis is None else value.shape[output.batch_axis]
        if not _is_real(value):
            return value, torch.ones(rows, device=value.device)
        assert self.dtype is not None
        axis = output.batch_axis
        by_row = value.abs().reshape(1, -1) if axis is None else value.abs().movedim(axis, 0).flatten(1)
        scale = by_row.amax(1).float() / torch.finfo(self.dtype).max
        scale = torch.where(scale > 0, scale, 1.0)
        return (value / _along(scale, value, output)).to(self.dtype).view(torch.uint8), scale

    def _moved(self, value: Tensor) -> Tensor:
        if self.device is None or value.device.type == self.device:
            return value
        pinned = self.device == "cpu" and value.device.type == "cuda"
        there = torch.empty(value.shape, dtype=value.dtype, device=self.device, pin_memory=pinned)
        return there.copy_(value, non_blocking=pinned)

    def _bytes(self, output: BranchTensor) -> int:
        dtype = getattr(torch, output.dtype)
        if self.dtype is None or not dtype.is_floating_point:
            return output.bytes
        return int(output.bytes // dtype.itemsize * self.dtype.itemsize)


AS_THEY_ARE = CacheFormat()


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point()


def _along(scale: Tensor, value: Tensor, output: BranchTensor) -> Tensor:
    """One scale for each row, shaped to multiply ``value``."""
    shape = [1] * value.dim()
    if output.batch_axis is not None:
        shape[output.batch_axis] = len(scale)
    return scale.reshape(shape)
