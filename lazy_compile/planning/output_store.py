"""Outputs of branches that are needed again much later: beside the model, on the host, or in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Filed:
    """A tensor that lies elsewhere: as a copy on the host, or in the file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    offset: int = 0
    bytes: int = 0
    copy: Tensor | None = None


class TensorFile:
    """Tensors in a temporary file that is gone when it is closed, however the process ends.

    Args:
        folder: of the file; None is the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file, name = tempfile.mkstemp(prefix="lazy-compile-", dir=folder)
        self._written = 0
        Path(name).unlink()

    def write(self, tensor: Tensor) -> Filed:
        content = memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        filed = Filed(tensor.shape, tensor.dtype, tensor.device, self._written, len(content))
        while content:
            done = os.pwrite(self._file, content, self._written)
            self._written += done
            content = content[done:]
        return filed

    def read(self, filed: Filed) -> Tensor:
        content = torch.empty(filed.bytes, dtype=torch.uint8)
        buffer, at = memoryview(content.numpy().data), filed.offset
        while buffer:
            done = os.preadv(self._file, [buffer], at)
            if not done:
                raise OSError("a temporary file was cut short while a plan was made")
            buffer, at = buffer[done:], at + done
        return content.view(filed.dtype).reshape(filed.shape).to(filed.device)

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class Streaming:
    """How memory is spared on the way through a trajectory and back.

    Attributes:
        keep: where the outputs of all branches at all steps lie, in the model's dtype: beside the model, in the memory
            of the host, or in a file. From the last two each is fetched when it is needed, one at a time.
        folder: of the file; None is the system's folder for temporary files.
        repeat_branches: what a branch keeps for its gradients is computed again when the way back comes to it, so that
            of one call only one branch's is in memory. Takes one more evaluation of each branch that computes.
        open_file: makes the file in a folder.
    """

    keep: Place = "device"
    folder: Path | None = None
    repeat_branches: bool = False
    open_file: Callable[[Path | None], TensorFile] = TensorFile


@dataclass
class OutputStore:
    """Tensors by number; each is written once. ``get`` gives a tensor of the same values, dtype and device."""

    streaming: Streaming
    _held: list[Tensor | Filed] = field(default_factory=list)
    _file: TensorFile | None = None

    def put(self, tensor: Tensor) -> int:
        """Keep a tensor; the number to ask for it."""
        tensor = tensor.detach()
        if self.streaming.keep == "disk":
            self._file = self._file or self.streaming.open_file(self.streaming.folder)
            self._held.append(self._file.write(tensor))
        elif self.streaming.keep == "host" and tensor.device.type != "cpu":
            self._held.append(Filed(tensor.shape, tensor.dtype, tensor.device, copy=tensor.to("cpu")))
        else:
            self._held.append(tensor)
        return len(self._held) - 1

    def get(self, number: int) -> Tensor:
        held = self._held[number]
        if isinstance(held, Tensor):
            return held
        if held.copy is not None:
            return held.copy.to(held.device)
        assert self._file is not None
        return self._file.read(held)

    def close(self) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
