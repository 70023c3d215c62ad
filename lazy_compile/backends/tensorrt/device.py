"""The little of CUDA that running an engine takes, by way of PyTorch: memory, streams, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lazy_compile.errors import BackendError

ALIGNMENT = 256
"""Bytes; TensorRT asks it of every address that it is given."""


class CudaDevice:
    """The GPU that PyTorch uses now.

    Raises:
        BackendError: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError(
                "an engine runs on a GPU, and PyTorch sees none here; run it where there is one, or the ONNX file that "
                "it was built from in ONNX Runtime: OnnxRunner(...), lazy-compile run --onnx"
            )
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name()

    def queue(self) -> CudaQueue:
        return CudaQueue(self.torch)

    def aligned(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it if it lies where TensorRT cannot read it."""
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

    def pinned(self, *sizes: int) -> Tensor:
        """``bool[sizes]`` on the host, from which a copy to the GPU waits for nothing."""
        return torch.zeros(sizes, dtype=torch.bool, pin_memory=True)


class CudaQueue:
    """A CUDA stream for one execution context: TensorRT waits needlessly on the default one."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle = int(self.stream.cuda_stream)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Work in here runs after what the caller queued before, and before what it queues afterwards; no one waits.

        So memory that the caller frees afterwards is not given away before this work is done with it.
        """
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def mark(self) -> Callable[[], None]:
        """A function that waits until all work up to here is done."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return event.synchronize

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` as a CUDA graph: a function that repeats it. It is recorded, not done."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            work()
        replay: Any = graph.replay
        return replay  # type: ignore[no-any-return]
