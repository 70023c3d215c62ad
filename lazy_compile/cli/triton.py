"""``lazy-compile export-triton``: a model repository for the Triton Inference Server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import OutputOptions
from lazy_compile.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TritonOptions(OutputOptions):
    """What ``lazy-compile export-triton`` takes."""

    onnx: Annotated[Path, typer.Argument(metavar="ONNX", help="What export wrote with --gating predicate or input.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="The repository: the folder of all models.")]
    name: Annotated[str, typer.Option(help="Of the model in the repository.")] = "denoiser"
    gates: given.Gates = None
    embed_gates: Annotated[
        bool, typer.Option(help="Put the gates or the schedule into the graph; else every request brings its row.")
    ] = True
    backend: Annotated[
        Literal["onnxruntime", "tensorrt"], typer.Option(help="tensorrt builds an engine on and for the GPU at hand.")
    ] = "onnxruntime"
    sequences: Annotated[int, typer.Option(help="Trajectories that one instance keeps at once.")] = 16
    idle_seconds: Annotated[float, typer.Option(help="After which an unfinished trajectory is dropped.")] = 60.0


def export_triton(options: TritonOptions) -> None:
    """Write a model repository for the Triton Inference Server: a trajectory is a sequence, its caches are its state.

    The first request of a trajectory is sent with sequence_start, which makes every branch compute. With the policy in
    the graph (the default) a request brings nothing but what the original model takes.
    """
    from lazy_compile.backends.triton import export_triton as write
    from lazy_compile.reporting.terminal_tables import facts, plain, show, size
    from lazy_compile.runtime import artifact

    saved = None if options.gates is None else artifact.read(options.gates)
    if (
        saved is not None
        and options.embed_gates
        and (saved.config.warmup_steps > 1 or saved.config.max_reuse_age is not None)
    ):
        raise ConfigError(
            f"{options.gates} has warmup_steps or max_reuse_age, which no graph knows about; plan or calibrate "
            "without them, or give --no-embed-gates and let the client decide"
        )
    policy = None if saved is None else saved.policy
    report = write(
        options.onnx,
        options.output,
        options.name,
        policy=policy,
        embed_gates=options.embed_gates,
        backend=options.backend,
        sequences=options.sequences,
        idle_seconds=options.idle_seconds,
    )
    values = plain(report)
    show(values, options.json, facts({**values, "cache_bytes": size(report.cache_bytes)}))
