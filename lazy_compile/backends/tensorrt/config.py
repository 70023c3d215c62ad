"""What a user may ask of a build."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lazy_compile.backends.onnx.sizes import ShapeRange
from lazy_compile.backends.tensorrt.api import FlavorName, flavor_of
from lazy_compile.errors import ConfigError

LEVELS = range(6)
"""Builder optimization levels: 0 builds fast, 5 searches longest for fast kernels."""


@dataclass(frozen=True)
class BuildConfig:
    """Options of :func:`~lazy_compile.backends.tensorrt.build_engine`.

    Precision is none of them: networks are strongly typed, so an engine computes in the types of its ONNX file.

    Attributes:
        flavor: ``"tensorrt"`` builds on and for the GPU at hand; ``"rtx"`` needs none, for RTX GPUs.
        profiles: the ranges of sizes to serve, for files with free sizes; an engine takes the first that a call fits
            in. None of them: the range that the file was exported with, or the sizes of its example call alone. A size
            that is the same in all of them is fixed in the engine.
        compute_capabilities: GPUs to build for, ``("8.6", "8.9")`` (rtx only); empty leaves it to TensorRT-RTX, whose
            engines then run on compute capability 8.6 and newer. ``"CURRENT"`` is the GPU at hand.
        workspace_bytes: limit of scratch memory; None leaves it to TensorRT.
        optimization_level: 0 to 5; None leaves it to TensorRT.
        timing_cache: file of kernel timings, read if it exists and written afterwards (tensorrt only).
        tf32: whether float32 products may run in TF32, which TensorRT does unless told otherwise.
        max_aux_streams: streams beside the main one that an engine may use; None leaves it to TensorRT.
        refit: let the weights of the engine be replaced later, by the names of the initializers. It is built on a GPU,
            by TensorRT-RTX too.
        sanitize: let Polygraphy fold constants first, if every conditional still holds what it held. Off because it
            gains nothing on what ``export_onnx`` writes: it changed the number of nodes of no model that was tried.
    """

    flavor: FlavorName = "tensorrt"
    profiles: tuple[ShapeRange, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: str | Path | None = None
    tf32: bool = True
    max_aux_streams: int | None = None
    refit: bool = False
    sanitize: bool = False

    def __post_init__(self) -> None:
        flavor = flavor_of(self.flavor)
        if self.compute_capabilities and flavor.name != "rtx":
            raise ConfigError("compute_capabilities belong to flavor='rtx'; TensorRT builds for the GPU at hand")
        if self.timing_cache is not None and flavor.name == "rtx":
            raise ConfigError("timing_cache belongs to flavor='tensorrt'; TensorRT-RTX times nothing while it builds")
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise ConfigError(f"optimization_level is {self.optimization_level}; expected {LEVELS[0]} to {LEVELS[-1]}")
        if self.workspace_bytes is not None and self.workspace_bytes < 0:
            raise ConfigError(f"workspace_bytes is {self.workspace_bytes}; use 0 or more, or None for no limit")
        if self.max_aux_streams is not None and self.max_aux_streams < 0:
            raise ConfigError(f"max_aux_streams is {self.max_aux_streams}; use 0 or more, or None")

    def options(self) -> dict[str, Any]:
        """What the engine depends on, as JSON has it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in ("flavor", "timing_cache")
        }
