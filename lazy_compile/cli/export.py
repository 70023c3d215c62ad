"""``lazy-compile export``: a model with conditionals, as an ONNX file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import ModelOptions
from lazy_compile.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    """What ``lazy-compile export`` takes."""

    output: Annotated[
        Path, typer.Option("--output", "-o", help="The ONNX file to write; with --gating schedule a folder.")
    ]
    target: Annotated[
        Literal["onnx", "ort-mobile"],
        typer.Option(help="ort-mobile writes the .ort format of ONNX Runtime's builds for phones."),
    ] = "onnx"
    gates: given.Gates = None
    gating: given.GatingOption = "predicate"
    group: given.Group = None
    invariant: given.Invariants = None
    precision: given.Precision = None
    dynamic: Annotated[
        str,
        typer.Option(
            metavar="auto|none|NAME,NAME",
            help="Sizes to leave free: all that can be, none, or some such as batch,height.",
        ),
    ] = "auto"
    min_shapes: given.MinShapes = None
    opt_shapes: given.OptShapes = None
    max_shapes: given.MaxShapes = None
    simplify: Annotated[bool, typer.Option("--simplify", help="Also run onnxsim; dropped if it moves a branch.")] = (
        False
    )


def export(options: ExportOptions) -> None:
    """Write an ONNX model in which every branch is an If node, with its caches as inputs and outputs."""
    from lazy_compile.backends.onnx.export import export_onnx
    from lazy_compile.backends.onnx.prologue import prologue_path
    from lazy_compile.backends.onnx.sizes import parse_ranges, union_of
    from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
    from lazy_compile.cli.models import in_precision, load_lazy, load_model, parse_group, require_inputs
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import facts, plain, show

    mobile = options.target == "ort-mobile"
    if mobile and (options.gating == "schedule" or options.output.suffix != ".ort"):
        raise ConfigError(
            f"--target ort-mobile writes one .ort file; seen --output {options.output} and --gating {options.gating}: "
            "name it model.ort, with --gating predicate or input"
        )
    ranges = parse_ranges(options.min_shapes or (), options.opt_shapes or (), options.max_shapes or ())
    grouped = parse_group(options.group)
    named = in_precision(load_model(options.model, options.shape or (), options.device), options.precision)
    lazy = load_lazy(named, options.gates, options.settings or (), options.capture_cache)
    with progress_bars(not options.json) as on_progress, tempfile.TemporaryDirectory() as folder:
        report = export_onnx(
            lazy,
            Path(folder) / "model.onnx" if mobile else options.output,
            require_inputs(named),
            gating=options.gating,
            group=grouped,
            invariants=tuple(options.invariant or ()),
            dynamic={"auto": True, "none": False}.get(options.dynamic, tuple(options.dynamic.split(","))),
            shapes=union_of(ranges) if ranges else None,
            simplify=options.simplify,
            on_progress=on_progress,
        )
        if mobile:
            size, beside = (
                convert_to_ort(report.path, options.output),
                report.prologue and prologue_path(options.output, options.gating),
            )
            report = replace(report, bytes=size, path=options.output, prologue=beside)
    values = plain(report)
    show(values, options.json, facts(values))
