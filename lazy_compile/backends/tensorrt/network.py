"""From an ONNX file to a serialized engine: the calls that TensorRT and TensorRT-RTX have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lazy_compile.backends.onnx.sizes import Shape
from lazy_compile.backends.tensorrt.api import Flavor, Message, first_error, first_sentence, logger_of
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.profile import Profile
from lazy_compile.errors import BackendError, ConfigError
from lazy_compile.progress import OnProgress


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        name: the name in the ONNX file.
        is_input: an input, else an output.
        dtype: ``"float32"``, ``"bool"`` and so on.
        shape: its sizes, -1 where free.
        profiles: smallest, best and largest shape of an input with free sizes in each profile; empty for any other.
    """

    name: str
    is_input: bool
    dtype: str
    shape: Shape
    profiles: tuple[tuple[Shape, ...], ...] = ()


@dataclass
class Network:
    """A parsed network with its builder, which must outlive it."""

    trt: ModuleType
    builder: Any
    network: Any
    parser: Any

    def fix_sizes(self, profiles: Sequence[Profile]) -> None:
        """Fix what is the same in all profiles, which leaves the builder less to provide for."""
        for tensor in map(self.network.get_input, range(self.network.num_inputs)):
            shapes = [shape for profile in profiles for shape in profile.get(tensor.name, ())]
            if shapes:
                tensor.shape = [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True)]

    def tensors(self, profiles: Sequence[Profile]) -> tuple[EngineTensor, ...]:
        found = []
        for is_input, count, get in (
            (True, self.network.num_inputs, self.network.get_input),
            (False, self.network.num_outputs, self.network.get_output),
        ):
            for tensor in map(get, range(count)):
                shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
                sizes = tuple(profile[tensor.name] for profile in profiles) if is_input and -1 in shape else ()
                found.append(EngineTensor(tensor.name, is_input, dtype, shape, sizes))
        return tuple(found)


def dtype_name(dtype: Any) -> str:
    """A ``trt.DataType`` as PyTorch calls it."""
    name = str(dtype.name)
    return {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}.get(name, name.lower())


def parse_network(
    trt: ModuleType, flavor: Flavor, path: Path, messages: list[Message], model: bytes | None = None
) -> Network:
    """Read an ONNX file, or ``model`` in its place; every tensor keeps the type that the file gives it.

    Raises:
        BackendError: there is no GPU where the builder needs one, or an operator is not supported.
    """
    try:
        builder = trt.Builder(logger_of(trt))
    except (TypeError, RuntimeError) as error:  # what pybind makes of a factory that returned nothing
        raise BackendError(
            f"{flavor.title} cannot start ({first_error(messages)}): it builds on the GPU that will run the engine, "
            "and sees none here; build there, or use flavor='rtx', which needs none"
        ) from error
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger_of(trt))
    read = parser.parse_from_file(str(path)) if model is None else parser.parse(model, str(path))
    if not read or not network.num_outputs:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        if not errors:
            raise BackendError(f"{flavor.title} cannot read {path}: {first_error(messages)}")
        first = errors[0]
        node = f"{first.node_operator()} (node {first.node_name()})" if first.node_operator() else "the model"
        raise BackendError(
            f"{flavor.title} {trt.__version__} does not support {node} in {path}: {first_sentence(first.desc())}; "
            "replace that operator in the model, or run it in ONNX Runtime"
        )
    return Network(trt, builder, network, parser)


def configure(network: Network, config: BuildConfig, profiles: Sequence[Profile], timing_cache: bytes) -> Any:
    """A builder configuration, with optimization profiles.

    Raises:
        ConfigError: a compute capability is not known.
    """
    trt = network.trt
    settings = network.builder.create_builder_config()
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not config.tf32:
        settings.clear_flag(trt.BuilderFlag.TF32)
    if config.refit:
        settings.set_flag(trt.BuilderFlag.REFIT)
    if config.workspace_bytes is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if config.max_aux_streams is not None:
        settings.max_aux_streams = config.max_aux_streams
    if config.compute_capabilities:
        settings.num_compute_capabilities = len(config.compute_capabilities)
        for index, name in enumerate(config.compute_capabilities):
            settings.set_compute_capability(_capability(trt, name), index)
    if config.timing_cache is not None:
        settings.set_timing_cache(settings.create_timing_cache(timing_cache), False)
    network.fix_sizes(profiles)
    free = {tensor.name for tensor in network.tensors(profiles) if tensor.profiles}
    for profile in profiles if free else ():
        described = network.builder.create_optimization_profile()
        for name in free:
            described.set_shape(name, *profile[name])
        settings.add_optimization_profile(described)
    return settings


def _capability(trt: ModuleType, name: str) -> Any:
    known = {member.replace("SM", ""): member for member in trt.ComputeCapability.__members__ if member != "NONE"}
    member = known.get(name.upper().replace("SM", "").replace(".", ""))
    if member is None:
        raise ConfigError(f"compute capability {name!r} is not known to this TensorRT-RTX; it has {', '.join(known)}")
    return getattr(trt.ComputeCapability, member)


def serialize(network: Network, settings: Any, messages: list[Message], on_progress: OnProgress) -> Any:
    """Build, in a thread of its own so that Ctrl-C is messages: the plan, a buffer in host memory.

    Raises:
        BackendError: the builder refuses.
        KeyboardInterrupt: asked to stop; the builder has stopped too.
    """
    monitor = _monitor(network.trt, on_progress)
    settings.progress_monitor = monitor
    plans: list[Any] = []
    builder = threading.Thread(
        target=lambda: plans.append(network.builder.build_serialized_network(network.network, settings)),
        name=BUILDER,
        daemon=True,
    )
    builder.start()
    try:
        while builder.is_alive():
            builder.join(0.05)
    except KeyboardInterrupt:
        monitor.stopped = True
        builder.join()
        raise
    if not plans or plans[0] is None:
        raise BackendError(f"the engine could not be built: {first_error(messages)}")
    return plans[0]


BUILDER = "lazy_compile builder"

SHOWN_DEPTH = 2
"""Phases nest; those further in are too many to be shown."""


def _monitor(trt: ModuleType, on_progress: OnProgress) -> Any:
    report: Callable[..., None] = on_progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Reports the outer phases; TensorRT may call it from any of its threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            depth = 0 if parent is None else self.phases.get(parent, (0, 0))[0] + 1
            self.phases[phase] = depth, steps

        def step_complete(self, phase: str, step: int) -> bool:
            depth, steps = self.phases.get(phase, (SHOWN_DEPTH, 0))
            if depth < SHOWN_DEPTH:
                report(phase.lower(), step + 1, steps)
            return not self.stopped

        def phase_finish(self, phase: str) -> None:
            depth, steps = self.phases.get(phase, (SHOWN_DEPTH, 0))
            if depth < SHOWN_DEPTH:
                report(phase.lower(), steps, steps)

    return Monitor()
