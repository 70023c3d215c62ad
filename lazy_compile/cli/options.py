"""Arguments that several verbs of the command line take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="package.module:factory, a diffusers folder or a .pt2 file.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME:2x4x32x32",
        help="Random example input; NAME:2:int64 sets a dtype, NAME:scalar has no size. Repeatable.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An option of LazyConfig, such as reuse=last. Repeatable."),
]
Device = Annotated[str, typer.Option(help="Where the model runs.")]
Gates = Annotated[Path | None, typer.Option(help="A folder that calibrate or plan wrote.")]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="Function that returns sample(denoiser, seed); else a diffusers scheduler around the example inputs.",
    ),
]
Scheduler = Annotated[str, typer.Option(help="Of the default sampler: ddim or flow-match.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; 20 in the default sampler.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
LazyRatio = Annotated[float | None, typer.Option(help="Share of branch evaluations to reuse; give this or the next.")]
ComputeRatio = Annotated[
    float | None, typer.Option(help="MACs to spend over the dense model's, always-on parts included.")
]
GatingOption = Annotated[
    Literal["predicate", "input", "schedule"],
    typer.Option(
        "--gating",
        help="Who decides at every step: gates in the graph, the host by boolean inputs, or nobody (one lean model for "
        "each distinct row of the schedule in --gates, written to a folder).",
    ),
]
Group = Annotated[
    str | None,
    typer.Option(metavar="K|block", help="Branches under one conditional, or 'block'; default is the model's own."),
]
Invariants = Annotated[
    list[str] | None,
    typer.Option(
        "--invariant",
        metavar="NAME",
        help="An input that stays the same along a trajectory: what it decides is computed once, by a second model. "
        "Repeatable.",
    ),
]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16"] | None,
    typer.Option(help="Type of weights and activations; default is the model's own."),
]
