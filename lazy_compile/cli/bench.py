"""``lazy-compile bench``: speed, overhead, and what reuse costs in quality."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import typer

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import OutputOptions
from lazy_compile.config import Granularity


@contextmanager
def _a_line_for_each_row(enabled: bool) -> Iterator[None]:
    """On standard error, where rows of a measurement come minutes apart."""
    logger, handler = logging.getLogger("lazy_compile.bench"), logging.StreamHandler()
    level = logger.level
    if enabled:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(OutputOptions):
    """What ``lazy-compile speed`` takes."""

    output: given.Folder = Path("build/bench")


def speed(options: SpeedOptions) -> None:
    """Time gated models against dense ones, side by side, and write bench.json."""
    from lazy_compile.bench.speed import run as measure
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import plain, show, speed_table

    with progress_bars(not options.json) as on_progress, _a_line_for_each_row(not options.json):
        rows = [plain(row) for row in measure(options.output, on_progress=on_progress)]
    show({"rows": rows, "output": str(options.output)}, options.json, speed_table(rows), f"written to {options.output}")


@dataclass(frozen=True, kw_only=True)
class QualityOptions(OutputOptions):
    """What ``lazy-compile quality`` takes."""

    model: Annotated[str, typer.Argument(help="digits, scenes, emoji or all.")] = "all"
    output: given.Folder = Path("build/quality")
    samples: Annotated[int | None, typer.Option(min=2, help="Images for each set of noise.")] = None
    ratio: Annotated[list[float] | None, typer.Option(help="Compute ratios; may be given several times.")] = None


def quality(options: QualityOptions) -> None:
    """Score methods of doing less at equal compute, and write quality.json, quality.md and quality.html."""
    from lazy_compile.bench.quality_report import measure_all, quality_table
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import show

    given_settings = {"samples": options.samples, "ratios": tuple(options.ratio or ()) or None}
    changes = {name: value for name, value in given_settings.items() if value is not None}
    with progress_bars(not options.json) as on_progress:
        rows = measure_all(options.model, changes, options.output, on_progress)
    show(
        {"rows": rows, "output": str(options.output)}, options.json, quality_table(rows), f"written to {options.output}"
    )


@dataclass(frozen=True, kw_only=True)
class PeersOptions(OutputOptions):
    """What ``lazy-compile bench peers`` takes."""

    model: Annotated[str, typer.Argument(help="digits, scenes, emoji or all.")] = "all"
    output: given.Folder = Path("build/peers")
    steps: Annotated[list[int] | None, typer.Option(min=4, help="Denoising steps; may be given several times.")] = None
    samples: Annotated[int | None, typer.Option(min=2, help="Images for each set of noise.")] = None
    system: Annotated[list[str] | None, typer.Option(help="TaylorSeer, say; may be given several times.")] = None
    plan_samples: Annotated[int | None, typer.Option(min=1, help="Images a trajectory, to plan on.")] = None
    calls: Annotated[int | None, typer.Option(min=20, help="Of the model, for each plan without gradient.")] = None
    most_settings: Annotated[int | None, typer.Option(min=1, help="Of each system that are tried.")] = None
    timed: Annotated[bool, typer.Option(help="Time each, and hold a batch against single samples.")] = True


def peers(options: PeersOptions) -> None:
    """Run the caches of diffusers and cache-dit on the same noise as plans; write peers.json, .md, .png. Takes hours.

    What is measured is kept at once: a run that was stopped goes on where it was.
    """
    from lazy_compile.bench.peers_report import measure_peers, peers_table
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import show

    given_settings = {
        "samples": options.samples, "plan_samples": options.plan_samples, "plan_calls": options.calls,
        "most_settings": options.most_settings,
    }  # fmt: skip
    changes = {name: value for name, value in given_settings.items() if value is not None}
    changes |= {} if options.timed else {"timings": 0, "paired": 0}
    with progress_bars(not options.json) as on_progress, _a_line_for_each_row(not options.json):
        found = measure_peers(
            options.model, options.steps or [20], changes, options.output, on_progress, options.system
        )
    show({**found, "output": str(options.output)}, options.json, peers_table(found), f"written to {options.output}")


@dataclass(frozen=True, kw_only=True)
class PicturesOptions(OutputOptions):
    """What ``lazy-compile bench pictures`` takes."""

    output: given.Folder = Path("build/pictures")
    images: Annotated[int, typer.Option(min=2, help="Captions, evenly spread over all.")] = 12
    plan_images: Annotated[int, typer.Option(min=1, help="Images a trajectory where a schedule is missing.")] = 4
    calls: Annotated[int, typer.Option(min=20, help="Of the model, to plan a schedule that is missing.")] = 200


def pictures(options: PicturesOptions) -> None:
    """Draw emoji, dense over lazy at 70, 50 and 35% of the MACs; write emoji.png, emoji_50.png, emoji.json. Minutes.

    Schedules lie beside the weights, in examples/emoji/schedules; one that is missing is planned first.
    """
    from lazy_compile.bench.pictures import PlanSettings, measure_pictures
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import pictures_table, show

    settings = PlanSettings(options.plan_images, options.calls)
    with progress_bars(not options.json) as on_progress:
        rows = measure_pictures(options.output, options.images, settings, on_progress)
    show(
        {"rows": rows, "output": str(options.output)},
        options.json,
        pictures_table(rows),
        f"written to {options.output}",
    )


@dataclass(frozen=True, kw_only=True)
class QuestionsOptions(OutputOptions):
    """What ``lazy-compile questions`` takes."""

    output: given.Folder = Path("build/quality")


def questions(options: QuestionsOptions) -> None:
    """Ask the digits model what a table of methods does not say, and write questions.md with its pictures."""
    from lazy_compile.bench.ablations_report import ask_all
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import show

    with progress_bars(not options.json) as on_progress:
        answers = ask_all(options.output, on_progress=on_progress)
    show({"answers": answers, "output": str(options.output)}, options.json, f"written to {options.output}")


@dataclass(frozen=True, kw_only=True)
class OverheadOptions(OutputOptions):
    """What ``lazy-compile overhead`` takes."""

    output: given.Folder = Path("build/bench")
    model: Annotated[list[str] | None, typer.Option(help="tiny, DiT, SD3, FLUX, Wan or CogView4; by default all.")] = (
        None
    )
    repeats: Annotated[int, typer.Option(min=2, help="Timed calls of each model.")] = 15


def overhead(options: OverheadOptions) -> None:
    """Time transformed models that reuse nothing against their originals, side by side, and write overhead.json."""
    from lazy_compile.bench.midsize import MIDSIZE
    from lazy_compile.bench.overhead import run as measure
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import overhead_table, plain, show

    with progress_bars(not options.json) as on_progress:
        measured = measure(
            options.output, models=options.model or ("tiny", *MIDSIZE), repeats=options.repeats, on_progress=on_progress
        )
    rows = [plain(row) for row in measured]
    show(
        {"rows": rows, "output": str(options.output)},
        options.json,
        overhead_table(rows),
        f"written to {options.output}",
    )


@dataclass(frozen=True, kw_only=True)
class CompileOptions(OutputOptions):
    """What ``lazy-compile bench compile`` takes."""

    output: given.Folder = Path("build/bench")
    model: Annotated[list[str] | None, typer.Option(help="DiT, SD3, FLUX, Wan or CogView4; by default DiT, FLUX.")] = (
        None
    )
    granularity: Annotated[
        list[str] | None, typer.Option(help="branch, block, model or a number; by default the first two.")
    ] = None
    repeats: Annotated[int, typer.Option(min=2, help="Timed steps of each.")] = 8
    layers: Annotated[int | None, typer.Option(min=1, help="Layers, where the model shall be smaller.")] = None
    backend: Annotated[str, typer.Option(help="The backend of torch.compile.")] = "inductor"


def compile(options: CompileOptions) -> None:
    """Time torch.compile on lazy and dense models, side by side, and write compile.json row by row. Takes minutes."""
    from lazy_compile.bench.compiled import GRANULARITIES, MODELS
    from lazy_compile.bench.compiled import run as measure
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import compile_table, plain, show

    with progress_bars(not options.json) as on_progress, _a_line_for_each_row(not options.json):
        measured = measure(
            options.output, models=options.model or MODELS,
            granularities=[_granularity(each) for each in options.granularity or GRANULARITIES],
            repeats=options.repeats, layers=options.layers,
            backend=options.backend, on_progress=on_progress,
        )  # fmt: skip
    rows = [plain(row) for row in measured]
    show(
        {"rows": rows, "output": str(options.output)},
        options.json,
        compile_table(rows),
        f"written to {options.output}",
    )


def _granularity(text: str | int) -> Granularity:
    return cast(Granularity, int(text) if str(text).isdigit() else text)


@dataclass(frozen=True, kw_only=True)
class FullSizeOptions(OutputOptions):
    """What ``lazy-compile full-size`` takes."""

    output: given.Folder = Path("build/bench")
    model: Annotated[list[str] | None, typer.Option(help="FLUX.1-dev, say; by default all.")] = None
    plans: Annotated[bool, typer.Option(help="Simulate what planning takes, for the largest models.")] = True


def full_size(options: FullSizeOptions) -> None:
    """Transform published models at full size without their weights; write full_size.json and .md. Takes minutes.

    What is measured is kept at once: a run that was stopped goes on where it was.
    """
    from lazy_compile.bench.full_size import run as measure
    from lazy_compile.bench.full_size_models import FULL_SIZE
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import full_size_table, plain, plans_table, show

    models = options.model or tuple(FULL_SIZE)
    with progress_bars(not options.json) as on_progress, _a_line_for_each_row(not options.json):
        measured = measure(options.output, models=models, plans=options.plans, on_progress=on_progress)
    rows, plans = ([plain(row) for row in table] for table in measured)
    show(
        {"rows": rows, "plans": plans, "output": str(options.output)},
        options.json,
        full_size_table(rows),
        *([plans_table(plans)] if plans else []),
        f"written to {options.output}",
    )


@dataclass(frozen=True, kw_only=True)
class IdentityOptions(OutputOptions):
    """What ``lazy-compile bench identity`` takes."""

    output: given.Folder = Path("build/bench")
    scheduler: Annotated[list[str] | None, typer.Option(help="Of diffusers, by name; by default all.")] = None
    steps: Annotated[list[int] | None, typer.Option(min=2, help="Denoising steps; may be given several times.")] = None


def identity(options: IdentityOptions) -> None:
    """Measure how surely latents tell their request from others, and write identity.json and .md. Takes minutes.

    What is measured is kept at once: a run that was stopped goes on where it was.
    """
    from lazy_compile.bench.identity import STEPS
    from lazy_compile.bench.identity import run as measure
    from lazy_compile.progress import progress_bars
    from lazy_compile.reporting.terminal_tables import identity_table, plain, show

    with progress_bars(not options.json) as on_progress:
        measured = measure(
            options.output, steps=options.steps or STEPS, schedulers=options.scheduler, on_progress=on_progress
        )
    rows = [plain(row) for row in measured]
    show(
        {"rows": rows, "output": str(options.output)},
        options.json,
        identity_table(rows),
        f"written to {options.output}",
    )
