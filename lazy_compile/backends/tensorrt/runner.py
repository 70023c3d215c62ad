"""Engines run step by step, with the interface that all exported models have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.prologue import check_prologue, find_prologue
from lazy_compile.backends.runner import Runner
from lazy_compile.backends.session import TensorSpec
from lazy_compile.backends.tensorrt.api import first_error, flavor_of, load, logger_of
from lazy_compile.backends.tensorrt.device import ALIGNMENT, CudaDevice
from lazy_compile.backends.tensorrt.network import dtype_name
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.digests import verification
from lazy_compile.errors import ArtifactError, BackendError, ConfigError
from lazy_compile.policies.policy import Policy

logger = logging.getLogger("lazy_compile")


class TensorRTRunner(Runner):
    """An engine that ``build_engine`` wrote, or a folder of them, on the GPU at hand.

    Every stream, conditional or unconditional or of another request, has an execution context and a CUDA stream of its
    own; calls are queued in the order of the caller's own work, and nothing waits for the GPU. Calls with fixed
    decisions are replayed as CUDA graphs where the engine allows it.

    Args:
        path: the engine, with its description beside it, and its prologue if it has one; or a folder that
            ``build_engines`` wrote.
        cuda_graphs: False leaves CUDA graphs alone.
        verify: False reads the files without holding them against their digests.

    Raises:
        ArtifactError: there is no such engine, its description or prologue is missing or of another engine, or it is
            not lazy.
        BackendError: there is no GPU, or the engine is for another one or another version of TensorRT.
        MissingDependencyError: its flavor of TensorRT is not installed.
    """

    _made_for = "the engine was built for"
    _advice = "build another engine for these sizes, or one for a range with --minShapes and --maxShapes (profiles)"

    def __init__(self, path: str | Path, *, cuda_graphs: bool = True, verify: bool = True) -> None:
        with verification(verify):
            sessions, prologue = self._load(path, cuda_graphs)
        super().__init__(sessions, prologue)
        self._sidecar = next(iter(sessions.values())).sidecar
        self.policy = next(iter(sessions.values())).sidecar.policy

    @staticmethod
    def _load(path: str | Path, cuda_graphs: bool) -> tuple[dict[tuple[bool, ...], EngineSession], EngineFile | None]:
        files = ScheduleVariants.load(path).files if Path(path).is_dir() else {(): Path(path)}
        device: Any = None
        sessions = {}
        for mask, file in files.items():
            sidecar = EngineSidecar.load(file)
            plan = sidecar.check_file(file)
            device = device or open_device()
            sessions[mask] = EngineSession(file, sidecar, plan, device, cuda_graphs)
        prologue: EngineFile | None = None
        for mask, file in files.items():
            metadata = sessions[mask].metadata
            beside = find_prologue(file, metadata)
            if beside is not None:
                sidecar = EngineSidecar.load(beside)
                check_prologue(beside, sidecar.prologue, file, metadata)
                # It runs once a trajectory: a CUDA graph would take more memory than time.
                prologue = prologue or EngineFile(beside, sidecar, sidecar.check_file(beside), device, False)
        return sessions, prologue

    @cached_property
    def policy(self) -> Policy:
        """The rule that the engine was built with."""
        return self._sidecar.policy


def open_device() -> CudaDevice:
    return CudaDevice()


class EngineFile:
    """One loaded engine; see :class:`~lazy_compile.backends.session.LoadedFile`.

    Attributes:
        kept: names of tensors that lie in the same memory at every call of a stream.
    """

    kept: frozenset[str] = frozenset()

    def __init__(self, path: Path, sidecar: EngineSidecar, plan: bytes, device: Any, cuda_graphs: bool) -> None:
        self.path, self.sidecar, self.place, self.cuda_graphs = path, sidecar, device, cuda_graphs
        flavor = flavor_of(sidecar.flavor)
        trt = load(flavor)
        self.title = f"{flavor.title} {trt.__version__}"
        if str(trt.__version__) != sidecar.version:
            raise BackendError(
                f"{path} was built with {flavor.title} {sidecar.version}, and runs with no other; this is "
                f"{trt.__version__}: build it again here"
            )
        if sidecar.device and sidecar.device != device.name:
            raise BackendError(
                f"{path} was built on and for {sidecar.device}; this is {device.name}: build it again here"
            )
        self.log = logger_of(trt)
        self.log.errors.clear()
        self._runtime = trt.Runtime(self.log)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise BackendError(f"{self.title} cannot load {path}: {first_error(self.log.errors)}; build it again here")
        self._check_tensors(trt)
        self.device: torch.device = device.torch
        self.inputs, self.outputs = (
            {item.name: _spec(item.shape, item.dtype) for item in sidecar.tensors if item.is_input is is_input}
            for is_input in (True, False)
        )
        names = self.inputs | self.outputs
        self.on_host = {name for name in names if self.engine.get_tensor_location(name) == trt.TensorLocation.HOST}

    def context(self) -> EngineContext:
        return EngineContext(self)

    def _check_tensors(self, trt: Any) -> None:
        """
        Raises:
            ArtifactError: the engine takes or returns something else than its description says.
        """
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        seen = {
            (
                name,
                self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                dtype_name(self.engine.get_tensor_dtype(name)),
                tuple(self.engine.get_tensor_shape(name)),
            )
            for name in names
        }
        described = {(item.name, item.is_input, item.dtype, item.shape) for item in self.sidecar.tensors}
        if seen != described:
            name = sorted(seen ^ described)[0][0]
            raise ArtifactError(f"{self.path} and its description disagree about {name!r}; build the engine again")


class EngineSession(EngineFile):
    """The engine of a step; see :class:`~lazy_compile.backends.session.Session`."""

    def __init__(self, path: Path, sidecar: EngineSidecar, plan: bytes, device: Any, cuda_graphs: bool) -> None:
        self.metadata = model = _lazy_model(path, sidecar)
        caches = [name for slot in model.slots for name in (slot.input, slot.output)]
        self.kept = frozenset([*caches, *(spec.name for spec in model.invariants)])
        super().__init__(path, sidecar, plan, device, cuda_graphs)


class EngineContext:
    """An execution context with a queue of its own: the calls of one stream."""

    def __init__(self, session: EngineFile) -> None:
        self.session = session
        self.queue = session.place.queue()
        session.log.errors.clear()
        self.context = session.engine.create_execution_context()
        if self.context is None:
            raise BackendError(
                f"{session.title} cannot prepare {session.path} ({first_error(session.log.errors)}); free memory on "
                "the GPU, or run fewer streams at once"
            )
        self._decisions = _Decisions(session, sum(item.dtype == torch.bool for item in session.inputs.values()))
        self._free = {item.name: item for item in session.sidecar.tensors if item.is_input and -1 in item.shape}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile = 0
        self._captures = session.cuda_graphs and not session.on_host
        self._static: dict[str, Tensor] = {}
        self._steps: dict[tuple[int, ...], Callable[[], None]] = {}

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Queue one step; see :class:`~lazy_compile.backends.session.ExecutionContext`."""
        with self.queue.ordered():
            staged = self._decisions.stage(inputs)
            given = {name: self.session.place.aligned(tensor) for name, tensor in staged.items()}
            shapes = {name: tuple(given[name].shape) for name in self._free}
            if shapes != self._shapes:
                self._take_shapes(shapes)
            if self._captures:
                self._repeat(given, outputs)
            else:
                self._enqueue({**given, **outputs})
            self._decisions.free_when(self.queue.mark)

    def _take_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Prepare for calls of other sizes.

        Raises:
            ConfigError: the engine was not built for them.
        """
        count = max((len(item.profiles) for item in self._free.values()), default=0)
        found = next((index for index in range(count) if self._fits(index, shapes)), None)
        if found is None:
            name = next(iter(shapes))
            ranges = "; ".join(f"{each[0]} to {each[-1]}" for each in self._free[name].profiles)
            raise ConfigError(
                f"{self.session.path} was not built for these sizes: {name!r} is {shapes[name]}, and the profiles hold "
                f"{ranges}; build it with --minShapes and --maxShapes around them"
            )
        self._shapes, self._static, self._steps = {}, {}, {}
        self._captures = self.session.cuda_graphs and not self.session.on_host
        self.session.log.errors.clear()
        if found != self._profile:
            if not self.context.set_optimization_profile_async(found, self.queue.handle):
                raise self._failure(f"cannot take profile {found}")
            self._profile = found
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise self._failure(f"does not take {name!r} of shape {shape}")
        self._shapes = shapes

    def _fits(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return all(
            all(low <= size <= high for low, size, high in zip(least, shapes[name], most, strict=True))
            for name, item in self._free.items()
            for least, _, most in [item.profiles[profile]]
        )

    def _enqueue(self, tensors: Mapping[str, Tensor]) -> None:
        self.session.log.errors.clear()
        for name, tensor in tensors.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"does not take {name!r}")
        if not self.context.execute_async_v3(self.queue.handle):
            raise self._failure("failed")

    def _failure(self, what: str) -> BackendError:
        session = self.session
        return BackendError(f"{session.title} {what} while it ran {session.path}: {first_error(session.log.errors)}")

    # CUDA graphs --------------------------------------------------------------------------------------------------

    def _repeat(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """A graph repeats addresses: those of the two pairs of cache buffers and of what a prologue computed, and of
        memory that all else goes through.

        The first step with a pair runs as it is, which TensorRT asks for, the second is captured.
        """
        own = {name: tensor for name, tensor in {**inputs, **outputs}.items() if name not in self.session.kept}
        if not self._static:
            self._static = {name: torch.empty_like(tensor) for name, tensor in own.items()}
        for name in own.keys() & inputs.keys():
            self._static[name].copy_(own[name], non_blocking=True)
        tensors = {**inputs, **outputs, **self._static}
        pair = tuple(tensor.data_ptr() for name, tensor in sorted(tensors.items()) if name in self.session.kept)
        step = self._steps.get(pair)
        if step is None:
            self._enqueue(tensors)
            self._captures = self._is_capturable()
            self._steps[pair] = lambda: self._capture(pair, tensors)
        else:
            step()
        for name in own.keys() & outputs.keys():
            own[name].copy_(self._static[name], non_blocking=True)

    def _capture(self, pair: tuple[int, ...], tensors: Mapping[str, Tensor]) -> None:
        try:
            self._steps[pair] = self.queue.capture(lambda: self._enqueue(tensors))
        except (BackendError, RuntimeError) as error:
            logger.warning("%s runs without CUDA graphs: %s", self.session.path, error)
            self._captures = False
            self._enqueue(tensors)
            return
        self._steps[pair]()

    def _is_capturable(self) -> bool:
        """TensorRT-RTX can be asked; of TensorRT it is known that a condition that the host reads forbids it."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return not self.session.sidecar.structure().branches if ask is None else bool(ask(self.queue.handle))


class _Decisions:
    """Booleans that the host decides, on their way to the GPU: one copy from pinned memory for all of them.

    There are two pinned blocks in turn, so that the host need not wait for the copy before.
    """

    def __init__(self, session: EngineFile, count: int) -> None:
        self._on_host = session.on_host
        self._blocks = [session.place.pinned(count, ALIGNMENT) for _ in range(2)] if count else []
        self._device = torch.empty(count, ALIGNMENT, dtype=torch.bool, device=session.device) if count else None
        self._free: list[Callable[[], None] | None] = [None, None]
        self._turn = 0

    def stage(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, decisions among them where the engine reads them."""
        names = [name for name, tensor in inputs.items() if tensor.dtype == torch.bool and tensor.dim() == 0]
        if not names or self._device is None:
            return dict(inputs)
        if (wait := self._free[self._turn]) is not None:
            wait()
        block = self._blocks[self._turn]
        for row, name in enumerate(names):
            block[row, 0] = inputs[name]
        self._device.copy_(block, non_blocking=True)
        rows = {name: (block if name in self._on_host else self._device)[row, 0] for row, name in enumerate(names)}
        return {**inputs, **rows}

    def free_when(self, mark: Callable[[], Callable[[], None]]) -> None:
        """The block may be written again when the work up to here is done."""
        if self._device is not None:
            self._free[self._turn] = mark()
            self._turn = 1 - self._turn


def _lazy_model(path: Path, sidecar: EngineSidecar) -> OnnxMetadata:
    if sidecar.model is None:
        raise ArtifactError(
            f"{path} was built from ONNX that export_onnx did not write: nothing is known about its caches; export the "
            "model with export_onnx and build that"
        )
    return sidecar.model


def _spec(shape: tuple[int, ...], dtype: str) -> TensorSpec:
    return TensorSpec(shape, getattr(torch, dtype))
