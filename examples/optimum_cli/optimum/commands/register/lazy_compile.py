"""``optimum-cli lazy-compile VERB ...``: optimum loads whatever is installed in this folder."""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LazyCompileCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands everything behind its name to the command line of lazy_compile."""

    COMMAND = CommandInfo(name="lazy-compile", help="Let a diffusion transformer skip branches, and export it.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("verb", help="inspect, plan, calibrate, export, ...; VERB --help says more")
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        from lazy_compile.cli.app import app

        app([self.args.verb, *self.args.arguments], prog_name=f"{sys.argv[0]} lazy-compile")


REGISTER_COMMANDS = [LazyCompileCommand]
