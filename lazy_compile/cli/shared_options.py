"""Arguments that several verbs take, and how a dataclass of them becomes a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="package.module:factory, a diffusers folder, owner/name of the Hub, or a .pt2 file."
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME:2x4x32x32",
        help="Random example input; NAME:2:int64 sets a dtype, NAME:scalar has no size. Repeatable.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An option of LazyConfig, such as reuse=last. Repeatable."),
]
CaptureCache = Annotated[
    Path | None,
    typer.Option(
        "--capture-cache",
        metavar="FOLDER",
        envvar="LAZY_COMPILE_CACHE_DIR",
        help="Keep captures in this folder, and take those that are there.",
    ),
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
Scheduler = Annotated[
    str | None, typer.Option(help="Of the default sampler: ddim or flow-match; by default what the model says.")
]
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
MinShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--minShapes",
        metavar="NAME:1x4x32x32,...",
        help="The smallest shapes, as trtexec takes them. Repeated, it begins another profile.",
    ),
]
OptShapes = Annotated[
    list[str] | None, typer.Option("--optShapes", metavar="NAME:2x4x64x64,...", help="The shapes to optimize for.")
]
MaxShapes = Annotated[
    list[str] | None, typer.Option("--maxShapes", metavar="NAME:8x4x128x128,...", help="The largest shapes.")
]
Onnx = Annotated[Path | None, typer.Option(help="The ONNX file that export wrote for this model.")]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What every verb takes."""

    json: Json = False


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(OutputOptions):
    """How a model is captured, and with which options it is made lazy."""

    shape: Shapes = None
    settings: Settings = None
    device: Device = "cpu"
    capture_cache: CaptureCache = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CaptureOptions):
    """What every verb takes that is given a model."""

    model: Model


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(OutputOptions):
    """What names a sampler, for any number of steps."""

    sampler: Sampler = None
    scheduler: Scheduler = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(SamplerOptions):
    """What every verb takes that runs one trajectory."""

    steps: Steps = None


def as_command(verb: Callable[[Any], None]) -> Callable[..., None]:
    """The command of a verb, a function that takes one dataclass of options: each field becomes an argument.

    A field's ``Annotated`` type carries the ``typer.Option`` or ``typer.Argument``; its default is the option's. Fields
    of base classes stand first, so that verbs share what they have in common by inheritance.
    """
    (kind,) = get_type_hints(verb, include_extras=True).keys() - {"return"}
    options = get_type_hints(verb)[kind]
    hints = get_type_hints(options, include_extras=True)

    def command(**values: Any) -> None:
        verb(options(**values))

    parameters = [
        Parameter(
            item.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if item.default is MISSING else item.default,
            annotation=hints[item.name],
        )
        for item in fields(options)
    ]
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command
