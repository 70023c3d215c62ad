"""The command line, ``lazy-compile VERB MODEL``: its verbs, an example of each, and what its exit codes mean."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lazy_compile.cli.bench import full_size, overhead
from lazy_compile.cli.build import build, export_triton
from lazy_compile.cli.prepare import calibrate, export, inspect, plan
from lazy_compile.cli.use import demo, quality, questions, report, run, speed, verify
from lazy_compile.digests import verification
from lazy_compile.errors import LazyCompileError

INTERRUPTED = 130


class OneLineErrors(TyperGroup):
    """Turns errors raised on purpose into one line and their exit code; any other keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LazyCompileError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def exit_codes() -> dict[int, str]:
    """What each exit code means."""
    kinds = sorted(LazyCompileError.__subclasses__(), key=lambda kind: kind.exit_code)
    meanings = {kind.exit_code: (kind.__doc__ or "").strip().splitlines()[0] for kind in kinds}
    return {0: "Done.", 1: "Something unforeseen.", **meanings, INTERRUPTED: "Interrupted."}


app = typer.Typer(
    name="lazy-compile",
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Make diffusion transformers lazy: find their attention and MLP branches, learn when a branch may reuse what "
        "it produced at an earlier denoising step, export the result.\n\n"
        "MODEL is package.module:factory (a function that returns a torch.nn.Module, or the module and a dict of "
        "example inputs), a diffusers folder (dir or dir#subfolder), or a .pt2 file."
    ),
    epilog="\n\n".join(["Exit codes:", *(f"{code} - {meaning}" for code, meaning in exit_codes().items())]),
)
bench = typer.Typer(help="Measure speed, and what reuse costs in quality.", no_args_is_help=True)


@app.callback()
def common(
    context: typer.Context,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Whether files are held against their digests before use.")
    ] = True,
) -> None:
    """Options of every verb."""
    context.with_resource(verification(verify))


_GIVEN = "lazy_compile.demo:model --sampler lazy_compile.demo:sampler"
for group, verb, example in (
    (app, inspect, "inspect lazy_compile.demo:model --why-not"),
    (app, calibrate, f"calibrate {_GIVEN} --target-lazy-ratio 0.4 --output gates"),
    (app, plan, f"plan {_GIVEN} --compute-ratio 0.6 --output schedule"),
    (app, export, "export lazy_compile.demo:model --gates gates --output model.onnx"),
    (app, build, "build lazy_compile.demo:model --gates gates --flavor rtx --precision fp16 --output model.engine"),
    (app, export_triton, "export-triton model.onnx --gates gates --name denoiser --output models"),
    (app, run, f"run {_GIVEN} --gates gates --onnx model.onnx --output samples.npy"),
    (app, verify, f"verify {_GIVEN} --gates gates --onnx model.onnx"),
    (app, report, "report gates --output gates.html"),
    (bench, speed, "bench speed --output build/bench"),
    (bench, quality, "bench quality digits --output build/quality"),
    (bench, questions, "bench questions --output build/quality"),
    (bench, full_size, "bench full-size --model DiT-XL/2 --output build/bench"),
    (bench, overhead, "bench overhead --model Wan --output build/bench"),
    (app, demo, "demo --output build/demo"),
):
    group.command(epilog=f"Example: lazy-compile {example}")(verb)
app.add_typer(bench, name="bench")


def main() -> None:
    """The console script."""
    app()
