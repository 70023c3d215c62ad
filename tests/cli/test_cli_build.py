"""``lazy-compile build`` and the options of ``export`` that go before it, as a user types them."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

import lazy_compile
from lazy_compile import CacheSchedule
from lazy_compile.backends.onnx.structure import check_structure
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt import build as tensorrt_build
from lazy_compile.backends.tensorrt import network as tensorrt_network
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.policies.policy import Scheduled
from support.command_line import answer, call, refusal
from support.conditional_models import one_if, written
from support.factories import tiny_dit

TINY = "support.factories:tiny_dit"


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A schedule that reuses every second step."""
    folder = tmp_path_factory.mktemp("gates")
    lazy = lazy_compile.transform(*tiny_dit())
    lazy.policy = Scheduled(CacheSchedule.every(2, 4, 4))
    lazy.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    answer("export", TINY, "--gating", "input", "--group", "block", "--output", path)
    return path


@pytest.fixture(scope="module")
def scheduled(gates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lean model for each of the two distinct steps of the schedule."""
    folder = tmp_path_factory.mktemp("set") / "set"
    values = answer("export", TINY, "--gates", gates, "--gating", "schedule", "--dynamic", "none", "--output", folder)
    assert (values["gating"], values["if_nodes"], values["masks"]) == ("schedule", 0, 2)
    return folder


# export


def test_export_takes_gating_and_group(exported: Path) -> None:
    assert check_structure(exported).if_nodes == 2
    names = {item.name for item in onnx.load(exported).graph.input}
    assert {"should_compute_0", "should_compute_2"} <= names


def test_export_writes_a_model_for_each_row_of_a_schedule(scheduled: Path) -> None:
    assert len(list(scheduled.glob("mask-*.onnx"))) == 2


# build


def test_a_model_becomes_an_engine_beside_its_onnx_file(tmp_path: Path) -> None:
    engine = ["--flavor", "rtx", "--output", tmp_path / "m.engine"]
    values = answer("build", TINY, "--precision", "fp16", *engine)
    (report,) = values["engines"]
    assert (report["path"], report["skipped"]) == (str(tmp_path / "m.engine"), False)
    assert (report["structure"]["branches"], report["structure"]["problems"]) == (4, [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.engine", "m.engine.json", "m.onnx"]
    assert values["onnx"] == str(tmp_path / "m.onnx")
    specs = {spec.name: spec.dtype for spec in OnnxRunner(tmp_path / "m.onnx").metadata.inputs}
    assert specs == {"hidden_states": "float16", "timestep": "int64"}
    assert answer("build", tmp_path / "m.onnx", *engine)["engines"][0]["skipped"], "the same is not built twice"
    assert not answer("build", tmp_path / "m.onnx", "--no-tf32", *engine)["engines"][0]["skipped"]


@pytest.mark.slow
def test_a_model_that_was_built_is_not_built_again(tmp_path: Path) -> None:
    arguments = ["build", TINY, "--flavor", "rtx", "--output", tmp_path / "m.engine"]
    assert [answer(*arguments)["engines"][0]["skipped"] for _ in range(2)] == [False, True]


def test_an_onnx_file_becomes_an_engine_that_follows_the_gates(exported: Path, gates: Path, tmp_path: Path) -> None:
    result = call("build", exported, "--gates", gates, "--flavor", "rtx", "--output", tmp_path / "m.engine")
    assert result.exit_code == 0, result.output
    for text in ("engine", "jumps", "m.engine", "written to"):
        assert text in result.stdout
    sidecar = EngineSidecar.load(tmp_path / "m.engine")
    assert isinstance(sidecar.policy, Scheduled)
    assert sidecar.policy.schedule.steps == 4
    assert len(sidecar.structure().branches) == 2


def test_a_schedule_becomes_a_folder_of_engines(scheduled: Path, tmp_path: Path) -> None:
    values = answer("build", scheduled, "--flavor", "rtx", "--output", tmp_path / "engines")
    assert [engine["structure"]["branches"] for engine in values["engines"]] == [0, 0]
    assert len(list((tmp_path / "engines").glob("*.engine"))) == 2


def test_options_reach_the_builder(exported: Path, tmp_path: Path) -> None:
    options = ["--compute-capabilities", "8.6,8.9", "--workspace", 64, "--optimization-level", 2, "--no-tf32"]
    answer("build", exported, "--flavor", "rtx", *options, "--output", tmp_path / "m.engine")
    seen = EngineSidecar.load(tmp_path / "m.engine").options
    assert (seen["compute_capabilities"], seen["workspace_bytes"]) == (["8.6", "8.9"], 64 * 2**20)
    assert (seen["optimization_level"], seen["tf32"]) == (2, False)


# --dry-run, --print-trtexec, --print-polygraphy


def test_a_dry_run_needs_no_tensorrt_and_writes_nothing(tmp_path: Path) -> None:
    values = answer("build", TINY, "--output", tmp_path / "m.engine", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert (values["branches"], values["conditionals"], values["gating"], values["engines"]) == (4, 4, "predicate", 1)
    roles = {tensor["name"]: tensor["role"] for tensor in values["tensors"]}
    assert {roles[name] for name in ("hidden_states", "timestep")} == {"model"}
    assert (roles["cache_0_0"], roles["next_cache_0_0"], roles["gate_weight"]) == ("cache", "cache", "gate")
    branch = 2 * 16 * 16 * 4
    clock = values["cache_bytes"] - 2 * 4 * 2 * branch  # two buffers, four branches, a value and a difference
    assert 0 < clock <= 2 * 3 * 4 * 4
    assert 1 < values["speedups"]["0.5"] < values["speedups"]["1.0"]


def test_a_dry_run_is_a_table_of_what_goes_in_and_out(exported: Path, tmp_path: Path) -> None:
    text = call("build", exported, "--output", tmp_path / "m.engine", "--dry-run").stdout
    for part in ("should_compute_2", "2x1x4x4", "the host, by boolean inputs", "caches of one stream", "at 50%"):
        assert part in text
    assert "nothing was written" in text


def test_a_dry_run_of_a_schedule_says_what_it_saves(scheduled: Path, tmp_path: Path) -> None:
    values = answer("build", scheduled, "--output", tmp_path / "engines", "--dry-run")
    ((reuse, speedup),) = values["speedups"].items()
    assert (float(reuse), values["engines"]) == (0.5, 2)
    assert speedup > 1.2


def test_the_same_with_the_tools_of_nvidia(exported: Path, tmp_path: Path) -> None:
    shapes = ["--minShapes", "hidden_states:2x1x4x4", "--maxShapes", "hidden_states:2x1x4x4,timestep:2"]
    rtx = ["--flavor", "rtx", "--compute-capabilities", "8.9,SM120", "--no-tf32"]
    lines = answer("build", exported, *rtx, *shapes, "-o", "m.engine", "--print-trtexec", "--print-polygraphy")
    first, second = map(shlex.split, lines["commands"])
    caches = {f"{kind}_{index}_0": (2, 16, 16) for index in range(4) for kind in ("cache", "delta")}
    sizes = {"hidden_states": (2, 1, 4, 4), "timestep": (2,), **caches}
    given = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sizes.items())
    assert first == [
        "tensorrt_rtx", f"--onnx={exported}", "--saveEngine=m.engine", "--profilingVerbosity=detailed",
        "--skipInference", *(f"--{which}Shapes={given}" for which in ("min", "opt", "max")),
        "--computeCapabilities=89,120", "--noTF32",
    ]  # fmt: skip
    listed = [f"{name}:[{','.join(map(str, shape))}]" for name, shape in sizes.items()]
    assert second == [
        *f"env POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert {exported} --convert-to trt --output m.engine".split(),
        *["--strongly-typed", "--profiling-verbosity", "detailed"],
        *(word for which in ("min", "opt", "max") for word in (f"--trt-{which}-shapes", *listed)),
    ]
    options = ["--timing-cache", "t", "--workspace", 512, "--optimization-level", 4]
    lines = answer("build", TINY, *options, "--group", 2, "-o", "m.engine", "--print-trtexec")
    assert lines["commands"] == [
        f"lazy-compile export {TINY} --output m.onnx --gating predicate --group 2 --dynamic none",
        "trtexec --onnx=m.onnx --saveEngine=m.engine --profilingVerbosity=detailed --stronglyTyped --skipInference "
        "--memPoolSize=workspace:512M --builderOptimizationLevel=4 --timingCacheFile=t",
    ]
    assert list(tmp_path.iterdir()) == []


def test_polygraphy_knows_the_options_that_are_printed() -> None:
    lines = answer(
        "build", "m.onnx", "-o", "m.engine", "--print-polygraphy", "--timing-cache", "t", "--workspace", 1,
        "--optimization-level", 1,
    )["commands"]  # fmt: skip
    command = [str(Path(sys.executable).with_name("polygraphy")), "convert", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = [word for word in lines[0].split() if word.startswith("--")]
    assert len(options) > 8
    assert [option for option in options if option not in help_text] == []


# Errors


@pytest.mark.parametrize(
    ("code", "options", "complaint"),
    [
        (2, ["--precision", "fp16"], "--precision says how a MODEL is exported; "),
        (2, ["--gating", "input"], "--gating says how a MODEL is exported; "),
        (2, ["--group", "two"], "--group is 'two'; expected a number of branches, or block"),
        (2, ["--minShapes", "x:2xN"], "--minShapes 'x:2xN' is not NAME:2x4x32x32"),
        (2, ["--maxShapes", "z:2", "--flavor", "rtx"], "there is no input 'z'; the inputs are "),
        (2, ["--compute-capabilities", "8.9"], "compute_capabilities belong to flavor='rtx'"),
        (2, ["--compute-capabilities", "1.1", "--flavor", "rtx"], "compute capability '1.1' is not known"),
        (2, ["--optimization-level", "9"], "optimization_level is 9; expected 0 to 5"),
        (8, [], "needs the package 'tensorrt', which cannot be imported"),
        (6, ["--compute-capabilities", "CURRENT", "--flavor", "rtx"], "and PyTorch sees none here; build on the mach"),
    ],
)
def test_a_refusal_is_one_line(
    exported: Path, tmp_path: Path, code: int, options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_build.torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert complaint in refusal(code, "build", exported, *options, "--output", tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == []


def test_mainline_without_a_gpu_is_one_line(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.4.0", __name__="tensorrt"))
    monkeypatch.setattr(tensorrt_build.torch.cuda, "is_available", lambda: False)
    line = refusal(6, "build", exported, "--output", tmp_path / "m.engine")
    assert "TensorRT builds for the GPU at hand, and PyTorch sees none here" in line
    assert "use flavor='rtx', which needs no GPU" in line


def test_what_is_missing_is_found_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "needs the package 'tensorrt'" in refusal(
        8, "build", "support.factories:broken", "--output", tmp_path / "m.engine"
    )


def test_onnx_of_others_is_built_on_request_only(tmp_path: Path) -> None:
    path, engine = written(tmp_path, one_if()), tmp_path / "m.engine"
    line = refusal(5, "build", path, "--flavor", "rtx", "--output", engine)
    assert "was not written by export_onnx and says nothing about branches and caches" in line
    assert not engine.exists()
    values = answer("build", path, "--any-onnx", "--flavor", "rtx", "--output", engine)
    assert values["engines"][0]["structure"]["branches"] == 1
    assert call("build", path, "--any-onnx", "--dry-run", "--output", engine).exit_code == 0


def test_an_operator_that_is_not_supported_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, one_if(then="a = other.Frobnicate(x)"))
    line = refusal(6, "build", path, "--any-onnx", "--flavor", "rtx", "--output", tmp_path / "m.engine")
    assert "does not support Frobnicate" in line


def test_files_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    assert "cannot read" in refusal(5, "build", tmp_path / "no.onnx", "-o", tmp_path / "m.engine", "--flavor", "rtx")
    assert "is not the name of an engine" in refusal(2, "build", TINY, "-o", tmp_path / "m.onnx")
    assert "after lazy-compile export; give what it wrote" in refusal(
        2, "build", TINY, "--gating", "schedule", "-o", tmp_path / "m", "--print-trtexec"
    )


def test_a_full_disk_is_one_line(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refusal(5, "build", exported, "--flavor", "rtx", "--output", tmp_path / "m.engine")
    assert "m.engine: No space left on device; nothing was left behind" in line
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_building_leaves_no_engine(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pressed: Iterator[bool] = iter([True])
    join = threading.Thread.join

    def interrupt(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name.startswith(tensorrt_network.BUILDER) and next(pressed, False):
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    result = call("build", exported, "--flavor", "rtx", "--output", tmp_path / "m.engine")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []
    assert not any(thread.name.startswith(tensorrt_network.BUILDER) for thread in threading.enumerate())
