"""The command line, ``lazy-compile VERB MODEL``: its verbs, an example of each, and what its exit codes mean."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from lazy_compile.cli.bench import compile as compile_bench
from lazy_compile.cli.bench import full_size, identity, overhead, peers, pictures, quality, questions, speed
from lazy_compile.cli.build import build
from lazy_compile.cli.calibrate import calibrate
from lazy_compile.cli.demo import demo
from lazy_compile.cli.error_boundary import OneLineErrors, debug_option, exit_codes
from lazy_compile.cli.export import export
from lazy_compile.cli.inspect import inspect
from lazy_compile.cli.plan import plan
from lazy_compile.cli.report import report
from lazy_compile.cli.run import run
from lazy_compile.cli.shared_options import as_command
from lazy_compile.cli.triton import export_triton
from lazy_compile.cli.verify import verify
from lazy_compile.digests import verification

app = typer.Typer(
    name="lazy-compile",
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Make diffusion transformers lazy: find their attention and MLP branches, learn when a branch may reuse what "
        "it produced at an earlier denoising step, export the result.\n\n"
        "Four commands from a model to a faster one:\n\n"
        "1. lazy-compile inspect MODEL\n\n"
        "2. lazy-compile calibrate MODEL --target-lazy-ratio 0.4 --output gates\n\n"
        "3. lazy-compile verify MODEL --gates gates\n\n"
        "4. lazy-compile export MODEL --gates gates --output model.onnx\n\n"
        "MODEL is package.module:factory (a function that returns a torch.nn.Module, or the module and a dict of "
        "example inputs), a diffusers folder (dir or dir#subfolder), owner/name of the Hub, or a .pt2 file."
    ),
    epilog="\n\n".join(["Exit codes:", *(f"{code} - {meaning}" for code, meaning in exit_codes().items())]),
)
bench = typer.Typer(help="Measure speed, and what reuse costs in quality.", no_args_is_help=True)

LOOK, MAKE, JUDGE, DEPLOY = "Look", "Make lazy", "Run and judge", "Deploy"
_GIVEN = "lazy_compile.demo:model --sampler lazy_compile.demo:sampler"
for group, panel, verb, example in (
    (app, LOOK, inspect, "inspect lazy_compile.demo:model --why-not"),
    (app, MAKE, calibrate, f"calibrate {_GIVEN} --target-lazy-ratio 0.4 --output gates"),
    (app, MAKE, plan, f"plan {_GIVEN} --compute-ratio 0.6 --output schedule"),
    (app, DEPLOY, export, "export lazy_compile.demo:model --gates gates --output model.onnx"),
    (
        app,
        DEPLOY,
        build,
        "build lazy_compile.demo:model --gates gates --flavor rtx --output model.engine",
    ),
    (app, DEPLOY, export_triton, "export-triton model.onnx --gates gates --name denoiser --output models"),
    (app, JUDGE, run, f"run {_GIVEN} --gates gates --onnx model.onnx --output samples.npy"),
    (app, JUDGE, verify, f"verify {_GIVEN} --gates gates --onnx model.onnx"),
    (app, JUDGE, report, "report gates --output gates.html"),
    (bench, JUDGE, speed, "bench speed --output build/bench"),
    (bench, JUDGE, quality, "bench quality digits --output build/quality"),
    (bench, JUDGE, peers, "bench peers digits --output build/peers"),
    (bench, JUDGE, pictures, "bench pictures --output build/pictures"),
    (bench, JUDGE, questions, "bench questions --output build/quality"),
    (bench, JUDGE, full_size, "bench full-size --model DiT-XL/2 --output build/bench"),
    (bench, JUDGE, compile_bench, "bench compile --model DiT --layers 4 --output build/bench"),
    (bench, JUDGE, overhead, "bench overhead --model Wan --output build/bench"),
    (bench, JUDGE, identity, "bench identity --steps 10 --output build/bench"),
    (app, LOOK, demo, "demo --output build/demo"),
):
    group.command(epilog=f"Example: lazy-compile {example}", rich_help_panel=panel)(as_command(verb))
app.add_typer(bench, name="bench", rich_help_panel=JUDGE)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lazy-compile {metadata.version('lazy-compile')}")
        raise typer.Exit


@app.callback()
def global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Whether files are held against their digests before use.")
    ] = True,
    debug: Annotated[
        bool,
        typer.Option("--debug", callback=debug_option, help="Show tracebacks too; or set LAZY_COMPILE_DEBUG=1."),
    ] = False,
) -> None:
    """Options that stand before the verb."""
    context.with_resource(verification(verify))
