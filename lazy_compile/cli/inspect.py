"""``lazy-compile inspect``: the branches of a model, its graph after a pass, or the arms of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lazy_compile.cli.shared_options import ModelOptions
from lazy_compile.errors import ConfigError

if TYPE_CHECKING:
    from lazy_compile.runtime.module import LazyModule


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """What ``lazy-compile inspect`` takes."""

    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|ENGINE", help="A model, an engine that build wrote, or the log of a build."),
    ]
    why_not: Annotated[
        bool, typer.Option("--why-not", help="Also list what was looked at and not gated, with the reason.")
    ] = False
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Print the graph as it is after this pass instead.")
    ] = None
    expect: Annotated[
        int | None, typer.Option(metavar="N", help="Of the log of a build: how many branches it should have.")
    ] = None
    picture: Annotated[Path | None, typer.Option(help="Of an engine: an .svg file to draw it to.")] = None


def inspect(options: InspectOptions) -> None:
    """Show the branches of a model: what they are, what they cost, and what caching them takes.

    Of an engine: what runs at every step, and in either arm of each branch; the exit code is 7 if a branch is missing
    or something heavy runs outside of it.
    """
    from lazy_compile.cli.engine_inspection import inspect_engine, is_engine

    if is_engine(options.model):
        inspect_engine(options.model, options.expect, options.picture, options.json)
        return
    if options.expect is not None or options.picture is not None:
        raise ConfigError(f"--expect and --picture are about engines; {options.model} is none: leave them out")
    from lazy_compile.cli.models import load_lazy, load_model
    from lazy_compile.reporting.terminal_tables import (
        branch_table,
        granularity_table,
        inspection,
        inspection_summary,
        refusal_table,
        show,
    )

    named = load_model(options.model, options.shape or (), options.device)
    lazy = load_lazy(named, None, options.settings or (), options.capture_cache)
    if options.after is not None:
        graph = _graph_after(lazy, options.after)
        show({"model": options.model, "after": options.after, "graph": graph}, options.json, graph)
        return
    values = inspection(options.model, lazy)
    refusals = [refusal_table(values)] if options.why_not and values["refusals"] else []
    tables = (branch_table(values), inspection_summary(values), granularity_table(values))
    show(values, options.json, *tables, *refusals)


def _graph_after(lazy: LazyModule, wanted: str) -> str:
    from lazy_compile import pass_pipelines
    from lazy_compile.ir.pass_manager import PassManager
    from lazy_compile.passes.lift_cache_slots import LiftCacheSlots

    lifting = pass_pipelines.lifting(LiftCacheSlots(lazy.lazy_config.reuse, order=lazy.lazy_config.order))
    before = (*pass_pipelines.gating(lazy.lazy_config).passes, *lifting.passes)
    lowering, scheduled = pass_pipelines.lowering(), pass_pipelines.scheduled([True] * len(lazy.branches))
    after = scheduled if wanted in {item.name for item in scheduled.passes[:1]} else lowering
    pipeline = PassManager([*before, *after.passes])
    names = dict.fromkeys(item.name for item in (*before, *lowering.passes, *scheduled.passes))
    if wanted not in names:
        raise ConfigError(f"--after {wanted}: there is no such pass; the passes are {', '.join(names)}")
    return str(pipeline.run(lazy.graph.captured.program, until=wanted).graph)
