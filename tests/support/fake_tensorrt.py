"""A TensorRT that is none: engines are replayed by ONNX Runtime, behind the interface of addresses and queues.

It shows that a runner binds every tensor, by the right address, in the right order, and never reads and writes one
memory in one step. It shows nothing about what TensorRT computes, how fast it is, or whether CUDA streams keep order.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from lazy_compile.backends.onnx.sizes import shape_at
from lazy_compile.digests import digest_of


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class DataType(enum.Enum):
    FLOAT, HALF, INT64, INT32, BOOL = range(5)


DTYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32), "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64), "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}  # fmt: skip


class ILogger:
    def __init__(self) -> None:
        pass


@dataclass
class FakeTensorRT:
    """Stands for the module; ``onnx`` names the file that each engine was built from, ``sizes`` what is free in it."""

    version: str
    onnx: Mapping[str, Path]
    sizes: Mapping[str, int] = field(default_factory=dict)
    capturable: bool = True
    host_inputs: frozenset[str] = frozenset()
    refuses: str = ""
    contexts: list[FakeContext] = field(default_factory=list)

    __name__ = "fake_tensorrt"
    ILogger = ILogger
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation

    @property
    def __version__(self) -> str:
        return self.version

    def Runtime(self, log: Any) -> FakeRuntime:
        return FakeRuntime(self, log)

    def complain(self, log: Any, text: str) -> None:
        log.log(_Severity.ERROR, text)


class _Severity(enum.Enum):
    ERROR = 1


@dataclass
class FakeRuntime:
    trt: FakeTensorRT
    log: Any

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        if self.trt.refuses == "engine":
            self.trt.complain(self.log, "IRuntime::deserializeCudaEngine: the plan is of another platform")
            return None
        return FakeEngine(self.trt, self.log, self.trt.onnx[digest_of(plan)])


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, log: Any, path: Path) -> None:
        self.trt, self.log = trt, log
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = {item.name: item for item in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DTYPES[self.tensors[name].type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return shape_at(self.tensors[name].shape, self.trt.sizes)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.trt.host_inputs else TensorLocation.DEVICE

    def create_execution_context(self) -> FakeContext | None:
        if self.trt.refuses == "context":
            self.trt.complain(self.log, "Requested amount of GPU memory (1024 bytes) could not be allocated")
            return None
        self.trt.contexts.append(FakeContext(self))
        return self.trt.contexts[-1]

    def array(self, name: str, address: int) -> Any:
        """The memory of a tensor."""
        kind, shape = DTYPES[self.tensors[name].type][1], self.get_tensor_shape(name)
        count = prod(shape) * np.dtype(kind).itemsize
        return np.frombuffer((ctypes.c_char * count).from_address(address), dtype=kind).reshape(shape)


@dataclass
class FakeContext:
    engine: FakeEngine
    addresses: dict[str, int] = field(default_factory=dict)
    enqueued: int = 0
    replayed: int = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors or self.engine.trt.refuses == "address":
            self.engine.trt.complain(self.engine.log, f"there is no tensor {name}")
            return False
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, handle: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, handle: int) -> bool:
        if set(self.addresses) != set(self.engine.tensors):
            self.engine.trt.complain(self.engine.log, "not all tensors have an address")
            return False
        if self.engine.trt.refuses == "step":
            self.engine.trt.complain(self.engine.log, "[executionContext.cpp::enqueue::1] Cuda Runtime (out of memory)")
            return False
        queue = QUEUES[handle]
        if queue.recording is not None and self.engine.trt.refuses == "capture":
            self.engine.trt.complain(self.engine.log, "operation not permitted when stream is capturing")
            return False
        if queue.recording is not None:
            addresses = dict(self.addresses)
            queue.recording.append(lambda: self._replay(addresses))
            return True
        assert queue.is_open, "work is queued outside the caller's order"
        self.enqueued += 1
        self._compute(self.addresses)
        return True

    def _replay(self, addresses: Mapping[str, int]) -> None:
        self.replayed += 1
        self._compute(addresses)

    def _compute(self, addresses: Mapping[str, int]) -> None:
        arrays = {name: self.engine.array(name, address) for name, address in addresses.items()}
        inputs = {name: array for name, array in arrays.items() if name in self.engine.inputs}
        outputs = list(self.engine.outputs)
        for name in outputs:
            for other in arrays:
                assert other == name or not np.shares_memory(arrays[name], arrays[other]), f"{name} lies on {other}"
        # What is written is spoilt first, so that nothing can be read from it.
        fed = {name: array.copy() for name, array in inputs.items()}
        for name in outputs:
            arrays[name][...] = 1 if arrays[name].dtype == np.bool_ else 77
        for name, result in zip(outputs, self.engine.session.run(outputs, fed), strict=True):
            arrays[name][...] = result


class HostDevice:
    """Stands for the GPU."""

    torch = torch.device("cpu")
    name = "Abacus 9000"

    def __init__(self) -> None:
        self.queues: list[HostQueue] = []

    def queue(self) -> HostQueue:
        self.queues.append(HostQueue())
        return self.queues[-1]

    def aligned(self, tensor: Tensor) -> Tensor:
        return tensor

    def pinned(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.bool)


class HostQueue:
    def __init__(self) -> None:
        self.handle = len(QUEUES)
        QUEUES.append(self)
        self.is_open = False
        self.waits = 0
        self.recording: list[Callable[[], None]] | None = None

    @contextmanager
    def ordered(self) -> Iterator[None]:
        self.is_open = True
        yield
        self.is_open = False

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waits += 1

        return wait

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recording = recorded = []
        try:
            work()
        finally:
            self.recording = None
        return lambda: [step() for step in recorded] and None


QUEUES: list[HostQueue] = []
