"""``optimum-cli`` hands a verb to the command line of lazy_compile, once the bridge is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
BRIDGE = TESTS.parent / "examples" / "optimum_cli"


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BRIDGE), str(TESTS)])}
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_verb_runs_with_its_options() -> None:
    done = optimum_cli("lazy-compile", "inspect", "support.factories:tiny_dit", "--set", "reuse=last", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["branches"]) == 4


def test_an_error_is_one_line_and_its_exit_code() -> None:
    done = optimum_cli("lazy-compile", "inspect", "support.factories:nothing")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: support.factories has no 'nothing'")


def test_the_package_itself_brings_no_folder_that_looks_like_optimum() -> None:
    """transformers takes any folder of that name for optimum."""
    assert find_spec("optimum.commands.register") is None
