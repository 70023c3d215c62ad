"""Whatever goes wrong ends as one line."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import lazy_compile
from lazy_compile.cli.error_boundary import LONGEST_LINE, describe
from lazy_compile.cli.models import FolderModules
from support.command_line import call, refusal
from support.slow import slow_but

PASSES = Path(__file__).resolve().parents[2] / "passes"


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), "see that the file is there"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (ValueError("Exceeds the limit (4300 digits) for integer string conversion"), "far too long"),
        (RuntimeError("line\n" * 500), "--debug shows where"),
    ],
)
def test_an_error_of_others_is_one_short_line(error: Exception, next_step: str) -> None:
    line = describe(error)
    assert next_step in line
    assert "\n" not in line
    assert len(f"error: {line}") <= LONGEST_LINE


def test_a_broken_model_is_one_line_and_a_traceback_on_request() -> None:
    assert "RuntimeError: this factory is broken; " in refusal(1, "inspect", "support.factories:broken")
    assert "Traceback" in call("--debug", "inspect", "support.factories:broken").stderr
    assert "Traceback" not in call("inspect", "support.factories:broken").stderr


def test_a_shape_that_is_too_large_is_refused() -> None:
    shape = "hidden_states:99999999x99999999"
    assert "elements; expected" in refusal(2, "inspect", "support.factories:bare_dit", "--shape", shape)


def test_version() -> None:
    assert call("--version").stdout.startswith("lazy-compile ")


@pytest.mark.parametrize("name", slow_but(["merge_groups"], sorted(file.stem for file in PASSES.glob("[a-z]*.py"))))
def test_the_graph_after_every_pass_is_shown(name: str) -> None:
    result = call("inspect", "support.factories:tiny_dit", "--after", name)
    assert result.exit_code == 0, result.output
    assert "ExportedProgram" in result.stdout or "graph" in result.stdout


@pytest.mark.parametrize("name", lazy_compile.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert callable(getattr(lazy_compile, name)) or name == "PRESETS"


def test_a_folder_named_like_a_package_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "mine.py").write_text("")
    finder = FolderModules(tmp_path, "mine")
    assert finder.find_spec("triton") is None
    assert finder.find_spec("mine") is not None
    assert FolderModules(tmp_path, "triton").find_spec("triton") is not None
