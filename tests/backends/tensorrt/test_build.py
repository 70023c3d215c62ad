"""Building engines with TensorRT-RTX, which needs no GPU: options, errors, and files that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from lazy_compile.backends.onnx.sizes import ShapeRange, parse_shapes
from lazy_compile.backends.tensorrt import api as tensorrt_api
from lazy_compile.backends.tensorrt import build as tensorrt_build
from lazy_compile.backends.tensorrt import network as tensorrt_network
from lazy_compile.backends.tensorrt.api import FLAVORS, first_sentence, load, record
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.commands import polygraphy_command, trtexec_command
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.profile import size_ranges
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar, path_beside
from lazy_compile.errors import ArtifactError, BackendError, ConfigError, LazyCompileError, MissingDependencyError
from lazy_compile.policies.policy import GateQuery, Policy, Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from support.conditional_models import one_if, written

RTX = BuildConfig(flavor="rtx")


def test_an_engine_and_its_description(tmp_path: Path) -> None:
    report = build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", RTX)
    assert report.flavor.startswith("TensorRT-RTX 1.")
    assert report.bytes == (tmp_path / "m.engine").stat().st_size
    assert (len(report.structure.branches), report.structure.problems) == (1, ())
    sidecar = EngineSidecar.load(tmp_path / "m.engine")
    assert [(item.name, item.is_input, item.dtype, item.shape) for item in sidecar.tensors] == [
        ("x", True, "float32", (2, 8)),
        ("c", True, "bool", ()),
        ("y", False, "float32", (2, 8)),
    ]
    assert sidecar.structure() == report.structure
    assert sidecar.nodes == {"node_of_y": ("node_of_a",), "": ()}
    assert (sidecar.flavor, sidecar.model, sidecar.device) == ("rtx", None, "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.engine", "m.engine.json", "model.onnx"]


def test_a_product_outside_its_arm_is_seen_in_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, one_if(then="a = Relu(p)", before="p = MatMul(x, w)"))
    structure = build_engine(path, tmp_path / "m.engine", RTX).structure
    assert structure.problems == (
        "1 heavy kernels of a branch run at every step: node_of_p",
        "1 conditionals compute nothing heavy: node_of_y",
    )
    assert "right but not as lazy as it could be: 1 heavy kernels of a branch" in caplog.text


# Skipping, and files ------------------------------------------------------------------------------------------------


def test_an_identical_build_is_skipped(tmp_path: Path) -> None:
    path, engine = written(tmp_path, one_if()), tmp_path / "m.engine"
    first = build_engine(path, engine, RTX)
    again = build_engine(path, engine, RTX)
    assert (first.skipped, again.skipped) == (False, True)
    assert again.structure == first.structure


@pytest.mark.parametrize("what", ["model", "options", "policy", "engine", "description"])
def test_a_build_that_differs_is_not_skipped(tmp_path: Path, what: str) -> None:
    path, engine = written(tmp_path, one_if()), tmp_path / "m.engine"
    build_engine(path, engine, RTX)
    config, policy = RTX, None
    if what == "model":
        written(tmp_path, one_if(then="t = MatMul(x, w) a = Relu(t)"))
    elif what == "options":
        config = replace(RTX, tf32=False)
    elif what == "policy":
        policy = Scheduled(CacheSchedule.every(2, 4, 1))
    elif what == "engine":
        engine.write_bytes(engine.read_bytes()[:-1])
    else:
        engine.with_name("m.engine.json").unlink()
    assert not build_engine(path, engine, config, policy=policy).skipped
    assert build_engine(path, engine, config, policy=policy).skipped


def test_weights_beside_the_file_are_built_and_count(tmp_path: Path) -> None:
    path, engine = tmp_path / "model.onnx", tmp_path / "m.engine"

    def save(value: float, location: str) -> None:
        model = onnx.parser.parse_model(one_if())
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full((8, 8), value, np.float32), "w"))
        onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)

    save(0.5, "first.data")
    assert not build_engine(path, engine, RTX).skipped
    save(0.5, "second.data")
    assert build_engine(path, engine, RTX).skipped, "the name of that file is not part of the model"
    save(0.25, "third.data")
    assert not build_engine(path, engine, RTX).skipped
    (tmp_path / "third.data").unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*third.data: No such file"):
        build_engine(path, engine, RTX)


def test_a_full_disk_leaves_the_old_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, engine = written(tmp_path, one_if()), tmp_path / "m.engine"
    engine.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*m.engine: No space left on device; nothing was left"):
        build_engine(path, engine, RTX)
    assert engine.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"m.engine", "model.onnx"}


def test_ctrl_c_stops_the_builder_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, one_if())
    join = threading.Thread.join
    interrupted = False

    def interrupt(thread: threading.Thread, timeout: float | None = None) -> None:
        nonlocal interrupted
        if thread.name.startswith(tensorrt_network.BUILDER) and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(path, tmp_path / "m.engine", RTX)
    assert not any(thread.name.startswith(tensorrt_network.BUILDER) for thread in threading.enumerate())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    monkeypatch.undo()
    assert not build_engine(path, tmp_path / "m.engine", RTX).skipped, "the builder is not stuck"


def test_a_builder_that_was_asked_to_stop_does(tmp_path: Path) -> None:
    trt = load(FLAVORS["rtx"])
    monitor = tensorrt_network._monitor(trt, lambda *_: None)
    assert monitor.step_complete("phase", 0)
    monitor.stopped = True
    assert not monitor.step_complete("phase", 1)


def test_progress_is_reported_phase_by_phase(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", RTX, on_progress=lambda *item: seen.append(item))
    phases = {stage for stage, _, _ in seen}
    assert "building engine" in phases
    assert all(0 < done <= total for _, done, total in seen)
    assert all((stage, total) in {(s, d) for s, d, _ in seen} for stage, _, total in seen), "every phase ends"


# Options ------------------------------------------------------------------------------------------------------------


def test_free_sizes_get_a_profile(tmp_path: Path) -> None:
    config = replace(RTX, profiles=(ShapeRange({"x": (1, 8)}, {"x": (2, 8)}, {"x": (4, 8)}),))
    path = written(tmp_path, one_if(batch="batch"))
    build_engine(path, tmp_path / "m.engine", config)
    sidecar = EngineSidecar.load(tmp_path / "m.engine")
    assert sidecar.tensors[0].profiles == (((1, 8), (2, 8), (4, 8)),)
    assert sidecar.options["profiles"][0]["max"] == {"x": [4, 8]}


def test_an_engine_that_can_be_refitted_is_built_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = written(tmp_path, one_if()), replace(RTX, refit=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match=r"refitted on a GPU only.* replace_weights\(\)"):
        build_engine(path, tmp_path / "m.engine", config)
    assert "--refit" in trtexec_command(path, tmp_path / "m.engine", config)
    assert "--refittable" in polygraphy_command(path, tmp_path / "m.engine", config)
    assert "--refit" not in trtexec_command(path, tmp_path / "m.engine", RTX)


def test_branches_are_checked_in_every_profile(tmp_path: Path) -> None:
    profiles = tuple(ShapeRange({"x": (low, 8)}, {"x": (high, 8)}, {"x": (high, 8)}) for low, high in ((1, 2), (4, 8)))
    path = written(tmp_path, one_if(batch="batch"))
    structure = build_engine(path, tmp_path / "m.engine", replace(RTX, profiles=profiles)).structure
    assert (len(structure.branches), structure.problems) == (1, ())
    assert not any("profile" in name for layer in structure.layers for name in layer.inputs)
    path = written(tmp_path, one_if(then="a = Relu(p)", before="p = MatMul(x, w)", batch="batch"))
    structure = build_engine(path, tmp_path / "m.engine", replace(RTX, profiles=profiles)).structure
    assert structure.problems[0] == "1 heavy kernels of a branch run at every step: node_of_p"
    with pytest.raises(ConfigError, match="size 'batch' of 'x' is free: give its range"):
        build_engine(path, tmp_path / "m.engine", RTX)


def test_all_other_options_are_taken(tmp_path: Path) -> None:
    config = replace(
        RTX, compute_capabilities=("8.9", "SM120"), workspace_bytes=2**24, optimization_level=2, tf32=False,
        max_aux_streams=0, sanitize=True,
    )  # fmt: skip
    assert build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", config).structure.problems == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavor": "trtx"}, "flavor is 'trtx'; expected one of 'tensorrt', 'rtx'"),
        ({"compute_capabilities": ("8.9",)}, "compute_capabilities belong to flavor='rtx'"),
        ({"flavor": "rtx", "timing_cache": "t"}, "timing_cache belongs to flavor='tensorrt'"),
        ({"optimization_level": 6}, "optimization_level is 6; expected 0 to 5"),
        ({"workspace_bytes": -1}, "workspace_bytes is -1; use 0 or more"),
        ({"max_aux_streams": -1}, "max_aux_streams is -1; use 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


def test_an_unknown_compute_capability_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute capability '9\.9' is not known to this TensorRT-RTX; it has"):
        build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", replace(RTX, compute_capabilities=("9.9",)))


def test_shapes_are_written_as_trtexec_writes_them() -> None:
    assert parse_shapes("--minShapes", "x:1x4x32x32,'a:b':1") == {"x": (1, 4, 32, 32), "a:b": (1,)}
    for text in ("x", "x:1x", ":1", "x:1xN"):
        with pytest.raises(ConfigError, match=r"--minShapes .* is not NAME:2x4x32x32"):
            parse_shapes("--minShapes", text)


def test_caches_follow_the_sizes_of_the_inputs() -> None:
    inputs: dict[str, list[int | str]] = {"x": ["batch", "width"], "cache": ["batch", "(width//2)*4", 8], "w": [3]}
    (sizes,) = size_ranges(inputs, None, [ShapeRange({"x": (1, 4)}, {}, {"x": (4, 8)})], {})
    assert sizes.profile(inputs) == {
        "x": ((1, 4), (4, 8), (4, 8)), "cache": ((1, 8, 8), (4, 16, 8), (4, 16, 8)),
    }  # fmt: skip
    assert size_ranges({"w": [3]}, None, [], {}) == ()


def test_commands_have_the_shapes_of_all_inputs_in_every_profile() -> None:
    profiles = [{"x": ((1, 8), (2, 8), (4, 8)), "a:b": ((1,), (2,), (4,))}, {"x": ((8, 8),) * 3, "a:b": ((8,),) * 3}]
    assert trtexec_command(Path("m.onnx"), Path("m.engine"), RTX, profiles)[5:] == [
        "--profile=0", "--minShapes=x:1x8,'a:b':1", "--optShapes=x:2x8,'a:b':2", "--maxShapes=x:4x8,'a:b':4",
        "--profile=1", "--minShapes=x:8x8,'a:b':8", "--optShapes=x:8x8,'a:b':8", "--maxShapes=x:8x8,'a:b':8",
    ]  # fmt: skip
    options = polygraphy_command(Path("m.onnx"), Path("m.engine"), RTX, profiles[:1])
    assert options[options.index("--trt-max-shapes") :][:3] == ["--trt-max-shapes", "x:[4,8]", "a:b:[4]"]


@pytest.mark.parametrize(
    ("least", "most", "message"),
    [
        ({"z": (1, 4)}, {}, "there is no input 'z'; the inputs are x, t"),
        ({"x": (1, 5)}, {}, r"shape \[1, 5\] of 'x' does not fit the model, in which it is \[batch, 4\]"),
        ({"x": (1, 4), "t": (2,)}, {}, "size 'batch' is 1 in one input and 2 in 't'"),
        ({"x": (4, 4)}, {"x": (1, 4)}, "expected min <= opt <= max throughout"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(least: Any, most: Any, message: str) -> None:
    dims: dict[str, list[int | str]] = {"x": ["batch", 4], "t": ["batch"]}
    with pytest.raises(ConfigError, match=message):
        [sizes.profile(dims) for sizes in size_ranges(dims, None, [ShapeRange(least, {}, most)], {})]


# Errors -------------------------------------------------------------------------------------------------------------


def test_an_operator_that_is_not_supported_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, one_if(then="a = other.Frobnicate(x)"))
    with pytest.raises(BackendError, match=r"TensorRT-RTX .* does not support Frobnicate \(node .*\) in .*model.onnx"):
        build_engine(path, tmp_path / "m.engine", RTX)


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(LazyCompileError) as caught:
        build_engine(tmp_path / "model.onnx", tmp_path / "m.engine", RTX)
    assert "model.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*none.onnx: No such file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine", RTX)


def test_a_missing_tensorrt_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"needs the package 'tensorrt'.*pip install 'lazy-compile\[tens"):
        build_engine(written(tmp_path, one_if()), tmp_path / "m.engine")


def stub(version: str = "10.4.0", **members: Any) -> Any:
    return SimpleNamespace(__version__=version, __name__="tensorrt", **members)


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stub("8.6.1"))
    with pytest.raises(BackendError, match=r"TensorRT is 8\.6\.1; expected 10\.0 or newer: pip install --upgrade"):
        load(FLAVORS["tensorrt"])


def test_libraries_that_do_not_load_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_api, "import_optional", broken)
    with pytest.raises(BackendError, match=r"its libraries cannot be loaded \(libnvinfer.so.10"):
        load(FLAVORS["tensorrt"])


def test_mainline_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stub())
    monkeypatch.setattr(tensorrt_build.torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="TensorRT builds for the GPU at hand, and PyTorch sees none here"):
        build_engine(written(tmp_path, one_if()), tmp_path / "m.engine")


def test_an_engine_for_the_gpu_at_hand_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build.torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="TensorRT-RTX builds for the GPU at hand"):
        build_engine(
            written(tmp_path, one_if()), tmp_path / "m.engine", replace(RTX, compute_capabilities=("CURRENT",))
        )


def test_a_policy_that_an_engine_cannot_follow_is_refused(tmp_path: Path) -> None:
    class Asks(Policy):
        def should_compute(self, query: GateQuery) -> bool:
            return True

    with pytest.raises(ConfigError, match="an engine cannot follow"):
        build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", RTX, policy=Asks())


def test_a_schedule_keeps_its_slopes(tmp_path: Path) -> None:
    table = CacheSchedule.every(2, 4, 3).should_compute
    policy = Scheduled(CacheSchedule(table, np.linspace(0.0, 1.0, 12).reshape(4, 3)))
    engine = tmp_path / "m.engine"
    report = build_engine(written(tmp_path, one_if()), engine, RTX, policy=policy)
    assert report.policy == "a schedule of 4 steps that reuses 50% of the branches"
    assert EngineSidecar.load(engine).policy == policy
    path = path_beside(engine)
    values = json.loads(path.read_text())
    values["policy"] |= {"steps": 4, "branches": 3}
    del values["content"], values["digest"]
    values |= {"format": 2, "sha256": hashlib.sha256(engine.read_bytes()).hexdigest()}
    path.write_text(json.dumps(values))
    last = EngineSidecar.load(engine)
    assert last.policy == policy
    assert last.check_file(engine) == engine.read_bytes()


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    engine, beside = tmp_path / "m.engine", tmp_path / "m.engine.json"
    build_engine(written(tmp_path, one_if()), engine, RTX)
    good = beside.read_text()
    for content in (good.replace('"format": 4', '"format": 7'), good.replace('"is_input"', '"input"'), "{}"):
        beside.write_text(content)
        with pytest.raises(ArtifactError, match=r"m.engine.json is damaged .*; build the engine again"):
            EngineSidecar.load(engine)
    beside.unlink()
    with pytest.raises(ArtifactError, match=r"m\.engine has no m\.engine\.json beside it; copy both"):
        EngineSidecar.load(engine)


def test_an_engine_of_another_build_is_refused(tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    build_engine(written(tmp_path, one_if()), engine, RTX)
    sidecar = EngineSidecar.load(engine)
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match=r"is not the engine that m.engine.json describes; copy both"):
        sidecar.check_file(engine)
    engine.unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*m.engine: No such file"):
        sidecar.check_file(engine)


def test_messages_lose_the_place_in_the_source() -> None:
    text = "IBuilder::build: Error Code 7: BuildCanceled (Build canceled by user In next at /_src/a/b.cpp:92)\nmore"
    assert first_sentence(text) == "IBuilder::build: Error Code 7: BuildCanceled (Build canceled by user) more"
    assert first_sentence("") == "it gave no reason"


def test_only_the_listener_hears(tmp_path: Path) -> None:
    trt = load(FLAVORS["rtx"])
    with record(trt) as outer, record(trt) as inner:
        trt.Builder(tensorrt_api.logger_of(trt)).create_network()
    assert isinstance(inner, list)
    assert outer == []
    assert tensorrt_api.logger_of(trt).messages is None
