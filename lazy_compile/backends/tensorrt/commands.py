"""What builds the same engine with NVIDIA's own tools, for those who would rather run these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lazy_compile.backends.tensorrt.api import flavor_of
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.profile import Profile

MEBIBYTE = 2**20


def trtexec_command(onnx: Path, engine: Path, config: BuildConfig, profiles: Sequence[Profile] = ()) -> list[str]:
    """Arguments for ``trtexec``, or for ``tensorrt_rtx``, its counterpart in TensorRT-RTX.

    ``profiles`` are the shapes of all inputs with free sizes, caches too.

    >>> trtexec_command(Path("m.onnx"), Path("m.engine"), BuildConfig(workspace_bytes=2**30))[:4]
    ['trtexec', '--onnx=m.onnx', '--saveEngine=m.engine', '--profilingVerbosity=detailed']
    """
    return [
        flavor_of(config.flavor).tool,
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        *_trtexec_options(config, profiles),
    ]


def _trtexec_options(config: BuildConfig, profiles: Sequence[Profile]) -> Iterator[str]:
    yield "--profilingVerbosity=detailed"
    if config.flavor == "tensorrt":
        yield "--stronglyTyped"  # TensorRT-RTX knows no other networks
    yield "--skipInference"
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            yield f"--profile={index}"
        for position, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            sizes = (f"{_quoted(name)}:{'x'.join(map(str, each[position]))}" for name, each in profile.items())
            yield f"{option}={','.join(sizes)}"
    if config.compute_capabilities == ("CURRENT",):
        yield "--useGpu"
    elif config.compute_capabilities:
        yield f"--computeCapabilities={','.join(map(_number, config.compute_capabilities))}"
    if config.workspace_bytes is not None:
        yield f"--memPoolSize=workspace:{config.workspace_bytes / MEBIBYTE:g}M"
    if config.optimization_level is not None:
        yield f"--builderOptimizationLevel={config.optimization_level}"
    if config.timing_cache is not None:
        yield f"--timingCacheFile={config.timing_cache}"
    if not config.tf32:
        yield "--noTF32"
    if config.refit:
        yield "--refit"
    if config.max_aux_streams is not None:
        yield f"--maxAuxStreams={config.max_aux_streams}"


def polygraphy_command(onnx: Path, engine: Path, config: BuildConfig, profiles: Sequence[Profile] = ()) -> list[str]:
    """Arguments for ``polygraphy convert``; with the variable in front of them it drives TensorRT-RTX."""
    front = ["env", "POLYGRAPHY_USE_TENSORRT_RTX=1"] if config.flavor == "rtx" else []
    command = ["polygraphy", "convert", str(onnx), "--convert-to", "trt", "--output", str(engine)]
    return [*front, *command, *_polygraphy_options(config, profiles)]


def _polygraphy_options(config: BuildConfig, profiles: Sequence[Profile]) -> Iterator[str]:
    yield from ("--strongly-typed", "--profiling-verbosity", "detailed")
    for profile in profiles:  # the first of each option belongs to the first profile, and so on
        for position, option in enumerate(("min", "opt", "max")):
            yield f"--trt-{option}-shapes"
            yield from (f"{name}:[{','.join(map(str, each[position]))}]" for name, each in profile.items())
    if config.workspace_bytes is not None:
        yield from ("--pool-limit", f"workspace:{config.workspace_bytes}")
    if config.optimization_level is not None:
        yield from ("--builder-optimization-level", str(config.optimization_level))
    if config.timing_cache is not None:
        yield from ("--load-timing-cache", str(config.timing_cache), "--save-timing-cache", str(config.timing_cache))
    if config.tf32:
        yield "--tf32"
    if config.refit:
        yield "--refittable"
    if config.max_aux_streams is not None:
        yield from ("--max-aux-streams", str(config.max_aux_streams))


def _quoted(name: str) -> str:
    return f"'{name}'" if ":" in name else name


def _number(capability: str) -> str:
    return capability.upper().removeprefix("SM").replace(".", "")
