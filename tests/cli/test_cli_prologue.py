"""``--invariant``, as a user types it: what is written, what is built, and how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from support.command_line import answer, call, refusal

MODEL = "support.hoisting:conditioned"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    values = answer("export", MODEL, "--gating", "input", "--invariant", "text", "--dynamic", "none", "--output", path)
    assert (values["invariants"], values["hoisted_tensors"]) == (["text"], 2)
    assert values["prologue"] == str(path.with_name("m.prologue.onnx"))
    assert values["hoisted_macs"] > 0
    assert 0 < values["hoisted_share"] < 0.2
    return path


def test_an_export_is_two_files(exported: Path) -> None:
    assert sorted(file.name for file in exported.parent.iterdir()) == ["m.onnx", "m.prologue.onnx"]


@pytest.mark.slow
def test_phones_get_two_files(tmp_path: Path) -> None:
    options = ["--target", "ort-mobile", "--invariant", "text", "--output", tmp_path / "m.ort"]
    values = answer("export", MODEL, *options)
    assert values["prologue"] == str(tmp_path / "m.prologue.ort")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.ort", "m.prologue.ort"]
    assert values["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    line = refusal(2, "export", MODEL, "--invariant", "prompt", "--output", tmp_path / "m.onnx")
    assert line == "'prompt' is no input that could stay the same; the inputs are x, timestep, text, shift"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_becomes_two_engines(tmp_path: Path) -> None:
    output = ["--invariant", "text", "--invariant", "shift", "--output", tmp_path / "m.engine"]
    values = answer("build", MODEL, "--flavor", "rtx", "--precision", "fp16", *output)
    assert [engine["path"] for engine in values["engines"]] == [
        str(tmp_path / "m.engine"), str(tmp_path / "m.prologue.engine"),
    ]  # fmt: skip
    assert [engine["structure"]["branches"] for engine in values["engines"]] == [3, 0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "m.engine", "m.engine.json", "m.onnx", "m.prologue.engine", "m.prologue.engine.json", "m.prologue.onnx",
    ]  # fmt: skip
    described = {item.name: item.dtype for item in EngineSidecar.load(tmp_path / "m.engine").tensors}
    assert described["invariant_0"] == described["invariant_1"] == "float16"


def test_an_onnx_file_has_its_invariants_already(exported: Path, tmp_path: Path) -> None:
    line = refusal(2, "build", exported, "--invariant", "text", "--output", tmp_path / "m.engine")
    assert line.startswith("--invariant says how a MODEL is exported")


def test_a_dry_run_shows_what_is_computed_once(exported: Path, tmp_path: Path) -> None:
    text = call("build", exported, "--output", tmp_path / "m.engine", "--dry-run").stdout
    for part in ("invariant_0", "computed once a trajectory", "nothing was written"):
        assert part in text


def test_the_tools_of_nvidia_build_both(exported: Path) -> None:
    lines = answer("build", exported, "-o", "m.engine", "--print-trtexec")["commands"]
    for line, stem in zip(lines, ["m", "m.prologue"], strict=True):
        assert line.startswith(f"trtexec --onnx={exported.with_name(stem)}.onnx --saveEngine={stem}.engine ")
    lines = answer("build", MODEL, "--invariant", "text", "-o", "m.engine", "--print-polygraphy")["commands"]
    assert lines[0] == f"lazy-compile export {MODEL} --output m.onnx --gating predicate --dynamic none --invariant text"
    assert [line.split()[2] for line in lines[1:]] == ["m.onnx", "m.prologue.onnx"]
