"""``lazy-compile run``: one trajectory, and what it saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import ModelOptions, SamplingOptions
from lazy_compile.errors import ConfigError

if TYPE_CHECKING:
    from lazy_compile.backends.runner import Runner


@dataclass(frozen=True, kw_only=True)
class RunOptions(SamplingOptions, ModelOptions):
    """What ``lazy-compile run`` takes."""

    gates: given.Gates = None
    onnx: given.Onnx = None
    engine: Annotated[Path | None, typer.Option(help="The engine that build wrote for this model; needs a GPU.")] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .npy file for the samples.")] = None
    dense: Annotated[bool, typer.Option(help="Also time the original model in PyTorch, with the same noise.")] = True


def run(options: RunOptions) -> None:
    """Sample one trajectory, in PyTorch, in ONNX Runtime (--onnx) or in TensorRT (--engine), and say what was saved.

    Of several processes that accelerate launch has started, each takes the next seed; the first writes all samples.
    """
    import numpy as np

    from lazy_compile import execution
    from lazy_compile.cli.models import announce, load_lazy, load_model, load_sampler
    from lazy_compile.processes import launched_processes, local_device
    from lazy_compile.reporting.terminal_tables import facts, reuse_picture, show, size
    from lazy_compile.storage import atomic_path

    runner = _runner(options.onnx, options.engine)
    named = load_model(options.model, options.shape or (), local_device(options.device))
    lazy = load_lazy(named, options.gates, options.settings or (), options.capture_cache)
    sample = load_sampler(options.sampler, named, lazy, options.steps, options.scheduler)
    with launched_processes() as processes:
        done = execution.run(
            lazy, sample, runner=runner, follow_runner=options.gates is None, seed=options.seed, dense=options.dense
        )
    if not processes.is_first:
        return
    stats = done.stats
    values: dict[str, Any] = {
        "runtime": "PyTorch" if runner is None else "ONNX Runtime" if options.engine is None else "TensorRT",
        "policy": type(done.policy).__name__,
        "steps": len(stats.evaluated),
        "seconds": done.seconds,
    }
    if done.dense_seconds is not None:
        values |= {"dense_seconds": done.dense_seconds, "dense_over_lazy": done.dense_seconds / done.seconds}
    values |= {
        "lazy_ratio": stats.lazy_ratio,
        "compute_ratio": stats.compute_ratio,
        "decisions_varying_between_samples": stats.decisions_varying_between_samples,
        "cache": size(done.cache_bytes),
        "samples": "x".join(map(str, done.samples.shape)),
    }
    if done.unused_steps:
        announce(
            f"the schedule has {done.unused_steps} steps more than the trajectory's {len(stats.evaluated)}: they are "
            "not followed, and less may be saved than was planned; plan again with these --steps"
        )
    if options.output is not None:
        with atomic_path(options.output) as temporary, temporary.open("wb") as file:
            np.save(file, done.samples.float().cpu().numpy())
        values["output"] = str(options.output)
    table = stats.reuse_table.tolist()
    picture = reuse_picture([branch.name for branch in lazy.branches], table)
    show(values | {"reuse": table}, options.json, picture, facts(values))


def _runner(onnx: Path | None, engine: Path | None) -> Runner | None:
    from lazy_compile.backends.open_runner import open_runner

    if onnx is not None and engine is not None:
        raise ConfigError("--onnx and --engine exclude each other: give the one to run")
    path = onnx or engine
    return None if path is None else open_runner(path)
