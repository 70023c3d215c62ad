"""``lazy-compile build``: a TensorRT engine, or the command that builds it elsewhere."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import CaptureOptions
from lazy_compile.errors import ConfigError

if TYPE_CHECKING:
    from lazy_compile.backends.onnx.metadata import Gating
    from lazy_compile.backends.onnx.sizes import ShapeRange
    from lazy_compile.backends.tensorrt.build import BuildReport
    from lazy_compile.backends.tensorrt.config import BuildConfig
    from lazy_compile.policies.policy import Policy
    from lazy_compile.progress import OnProgress


@dataclass(frozen=True, kw_only=True)
class BuildOptions(CaptureOptions):
    """What ``lazy-compile build`` takes."""

    source: Annotated[
        str, typer.Argument(metavar="MODEL|ONNX", help="A model as for export, or the file or folder that it wrote.")
    ]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The engine to write; a folder where there are several.")
    ]
    flavor: Annotated[
        Literal["tensorrt", "rtx"],
        typer.Option(help="tensorrt builds on and for the GPU at hand; rtx (TensorRT-RTX) needs none."),
    ] = "tensorrt"
    precision: given.Precision = None
    gating: given.GatingOption = "predicate"
    group: given.Group = None
    invariant: given.Invariants = None
    gates: given.Gates = None
    min_shapes: given.MinShapes = None
    opt_shapes: given.OptShapes = None
    max_shapes: given.MaxShapes = None
    compute_capabilities: Annotated[
        str, typer.Option(metavar="8.6,8.9|CURRENT", help="GPUs to build for (rtx); default is 8.6 and newer.")
    ] = ""
    timing_cache: Annotated[Path | None, typer.Option(help="File of kernel timings, kept up to date (tensorrt).")] = (
        None
    )
    workspace: Annotated[int | None, typer.Option(metavar="MIB", help="Limit of scratch memory.")] = None
    optimization_level: Annotated[int | None, typer.Option(help="0 builds fast, 5 searches longest.")] = None
    tf32: Annotated[bool, typer.Option(help="Whether float32 products may run in TF32.")] = True
    refit: Annotated[bool, typer.Option("--refit", help="Let weights be replaced later; needs a GPU to build.")] = False
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Let Polygraphy fold constants first; dropped if it moves a branch.")
    ] = False
    any_onnx: Annotated[bool, typer.Option("--any-onnx", help="Also take ONNX that export did not write.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built; needs no TensorRT.")] = False
    print_trtexec: Annotated[
        bool, typer.Option("--print-trtexec", help="Print the command that builds the same with trtexec, and stop.")
    ] = False
    print_polygraphy: Annotated[
        bool, typer.Option("--print-polygraphy", help="Print the one for Polygraphy, and stop.")
    ] = False


def build(options: BuildOptions) -> None:
    """Build a TensorRT engine in which every branch is a jump over its kernels.

    A MODEL is exported first; its ONNX file stays beside the engine, and runs in ONNX Runtime too. The engine is
    written when it is complete and its branches are checked, with a description beside it (ENGINE.json) that a runner
    needs. What was built already, from the same with the same options, is left as it is.
    """
    from lazy_compile.backends.onnx.sizes import parse_ranges
    from lazy_compile.backends.tensorrt.build import builder_for
    from lazy_compile.backends.tensorrt.config import BuildConfig
    from lazy_compile.backends.tensorrt.dry_run import preview
    from lazy_compile.backends.tensorrt.source import OnnxSource
    from lazy_compile.cli.engine_tables import build_table, preview_tables, preview_values, sizes_lines
    from lazy_compile.cli.models import parse_group
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import plain, show

    config = BuildConfig(
        flavor=options.flavor,
        profiles=parse_ranges(options.min_shapes or (), options.opt_shapes or (), options.max_shapes or ()),
        compute_capabilities=tuple(filter(None, options.compute_capabilities.split(","))),
        workspace_bytes=None if options.workspace is None else options.workspace * 2**20,
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
        tf32=options.tf32,
        refit=options.refit,
        sanitize=options.sanitize,
    )
    parse_group(options.group)
    request = _Request(
        options.source,
        options.gating,
        options.group,
        tuple(options.invariant or ()),
        options.precision,
        options.gates,
        tuple(options.shape or ()),
        tuple(options.settings or ()),
        options.device,
        config.profiles,
        options.capture_cache,
    )
    request.check(options.output)
    if options.print_trtexec or options.print_polygraphy:
        lines = list(_commands(request, options.output, config, options.print_trtexec, options.print_polygraphy))
        show({"commands": lines}, options.json, *lines)
        return
    if not options.dry_run:
        builder_for(config)  # it would be a pity to find out after a long export
    with tempfile.TemporaryDirectory() as folder, progress_bars(not options.json) as on_progress:
        onnx = request.onnx(Path(folder) / "model.engine" if options.dry_run else options.output)
        policy = request.export(onnx, on_progress)
        if request.is_onnx and onnx.is_file() and not options.any_onnx:
            OnnxSource.read(onnx).require_lazy()
        if options.dry_run:
            seen = preview(onnx, config.profiles)
        else:
            reports = _build(onnx, options.output, config, policy, on_progress)
    if options.dry_run:
        show(preview_values(seen, request.source, options.output), options.json, *preview_tables(seen))
        return
    engines = [{**plain(report), "structure": report.structure.summary()} for report in reports]
    values = {"engines": [{name: value for name, value in each.items() if name != "prologue"} for each in engines]}
    show(
        {**values, "onnx": str(onnx), "output": str(options.output)},
        options.json,
        build_table(reports),
        *sizes_lines(reports),
        f"written to {options.output}",
    )


@dataclass(frozen=True)
class _Request:
    """What an engine is built from: an ONNX file or folder, or a model and how it is exported."""

    source: str
    gating: Gating
    group: str | None
    invariants: tuple[str, ...]
    precision: str | None
    gates: Path | None
    shapes: tuple[str, ...]
    options: tuple[str, ...]
    device: str
    profiles: tuple[ShapeRange, ...]
    capture_cache: Path | None

    @property
    def is_onnx(self) -> bool:
        from lazy_compile.backends.onnx.masks import MANIFEST

        return self.source.endswith(".onnx") or (Path(self.source) / MANIFEST).is_file()

    def check(self, output: Path) -> None:
        """
        Raises:
            ConfigError: an option has no meaning here, or the engine would take the place of what it is built from.
        """
        belonging = {
            "--precision": self.precision,
            "--group": self.group,
            "--shape": self.shapes,
            "--set": self.options,
            "--gating": self.gating if self.gating != "predicate" else None,
            "--invariant": self.invariants,
        }
        if self.is_onnx and (given := [name for name, value in belonging.items() if value]):
            raise ConfigError(
                f"{given[0]} says how a MODEL is exported; {self.source} is exported already: leave it out"
            )
        if output.suffix == ".onnx" or output.resolve() == Path(self.source).resolve():
            raise ConfigError(f"--output {output} is not the name of an engine; give one such as model.engine")

    def onnx(self, output: Path) -> Path:
        """Where the ONNX file or folder lies, or will lie."""
        return Path(self.source) if self.is_onnx else output.with_suffix(".onnx")

    def export(self, onnx: Path, on_progress: OnProgress) -> Policy | None:
        """Write the ONNX file of a model; the rule that its engine follows unless told otherwise."""
        from lazy_compile.backends.onnx.export import export_onnx
        from lazy_compile.backends.onnx.sizes import union_of
        from lazy_compile.cli.models import in_precision, load_lazy, load_model, parse_group, require_inputs
        from lazy_compile.runtime import artifact

        if self.is_onnx:
            return None if self.gates is None else artifact.read(self.gates).policy
        named = in_precision(load_model(self.source, self.shapes, self.device), self.precision)
        lazy = load_lazy(named, self.gates, self.options, self.capture_cache)
        inputs, group = require_inputs(named), parse_group(self.group)
        export_onnx(
            lazy,
            onnx,
            inputs,
            gating=self.gating,
            group=group,
            invariants=self.invariants,
            shapes=union_of(self.profiles) if self.profiles else None,
            on_progress=on_progress,
        )
        return lazy.policy

    def export_command(self, onnx: Path) -> list[str]:
        command = ["lazy-compile", "export", self.source, "--output", str(onnx), "--gating", self.gating]
        for name, value in (("--gates", self.gates), ("--group", self.group), ("--precision", self.precision)):
            command += [name, str(value)] if value is not None else []
        command += ["--dynamic", "none"]  # trtexec and Polygraphy are told no shapes
        repeated = ("--invariant", self.invariants), ("--shape", self.shapes), ("--set", self.options)
        for name, values in repeated:
            command += [word for value in values for word in (name, value)]
        return command


def _build(
    onnx: Path, output: Path, config: BuildConfig, policy: Policy | None, on_progress: OnProgress
) -> list[BuildReport]:
    from lazy_compile.backends.tensorrt.build import build_engine, build_engines

    if onnx.is_dir():
        reports = build_engines(onnx, output, config, on_progress=on_progress)
    else:
        reports = [build_engine(onnx, output, config, policy=policy, on_progress=on_progress)]
    prologues = [report.prologue for report in reports if report.prologue is not None]
    return [replace(report, prologue=None) for report in reports] + prologues


def _commands(request: _Request, output: Path, config: BuildConfig, trtexec: bool, polygraphy: bool) -> Iterator[str]:
    """The lines of a shell that do the same with other tools."""
    from lazy_compile.backends.onnx.masks import ScheduleVariants
    from lazy_compile.backends.tensorrt.commands import polygraphy_command, trtexec_command
    from lazy_compile.backends.tensorrt.profile import size_ranges
    from lazy_compile.backends.tensorrt.source import OnnxSource

    onnx = request.onnx(output)
    pairs = [(onnx, output)]
    if not request.is_onnx:
        if request.gating == "schedule":
            raise ConfigError(
                "how many engines a schedule needs is known after lazy-compile export; give what it wrote"
            )
        if request.profiles:
            raise ConfigError("shapes of the caches are known after lazy-compile export; give the file that it wrote")
        yield shlex.join(request.export_command(onnx))
    elif onnx.is_dir():
        pairs = [(file, output / f"{file.stem}.engine") for file in ScheduleVariants.load(onnx).files.values()]
    pairs += list(_prologues(request, pairs))
    first = OnnxSource.read(pairs[0][0]) if request.is_onnx and pairs[0][0].is_file() else None
    ranges = () if first is None else size_ranges(first.dims, first.model, config.profiles, first.example)
    for file, engine in pairs:
        profiles = [sizes.profile(OnnxSource.read(file).dims) for sizes in ranges]
        if trtexec:
            yield shlex.join(trtexec_command(file, engine, config, profiles))
        if polygraphy:
            yield shlex.join(polygraphy_command(file, engine, config, profiles))


def _prologues(request: _Request, pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[Path, Path]]:
    """The prologue of these models, and the engine that it becomes; as far as that is known before the export."""
    from lazy_compile.backends.onnx.prologue import prologue_path
    from lazy_compile.backends.tensorrt.source import OnnxSource

    (onnx, engine), gating = pairs[0], request.gating
    if request.is_onnx:
        model = OnnxSource.read(onnx).model if onnx.is_file() else None
        if model is None or not model.prologue:
            return
        gating = model.gating
    elif not request.invariants:
        return
    yield prologue_path(onnx, gating), prologue_path(engine, gating)
