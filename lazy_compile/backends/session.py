"""What a runtime gives to a runner: loaded models, and contexts to call them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.sizes import Size


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an input or output; what a size that is no number is, its model's description says."""

    shape: tuple[Size, ...]
    dtype: torch.dtype


class ExecutionContext(Protocol):
    """What the calls of one stream need of a runtime for themselves, such as an execution context."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Read ``inputs`` and write into ``outputs``, in the order of the caller's own work on the device.

        Raises:
            BackendError: the runtime failed.
        """


class LoadedFile(Protocol):
    """One loaded model: where its tensors lie, and all that goes in and comes out."""

    @property
    def device(self) -> torch.device: ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def context(self) -> ExecutionContext: ...


class Session(LoadedFile, Protocol):
    """The model of a step, and what it says about itself."""

    @property
    def metadata(self) -> OnnxMetadata: ...
