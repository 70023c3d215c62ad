"""Engines with a prologue beside them: built with TensorRT-RTX, run with ONNX Runtime in the place of a GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lazy_compile import Policy
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.runner import Runner
from lazy_compile.backends.tensorrt import build as tensorrt_build
from lazy_compile.backends.tensorrt import runner as tensorrt_runner
from lazy_compile.backends.tensorrt.build import BuildReport, build_engine, build_engines
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.dry_run import preview
from lazy_compile.backends.tensorrt.runner import TensorRTRunner
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.errors import ArtifactError, BackendError
from lazy_compile.integrations.engine_module import EngineModule
from support.fake_tensorrt import FakeTensorRT, HostDevice
from support.hoisting import CONDITIONED, SCHEDULE, STEPS, Exports, counted, prompts
from support.toy_models import trajectory

RTX = BuildConfig(flavor="rtx")


class Engines:
    """Engines of one model, one that the host steers and a set for a schedule, and what they were built from."""

    def __init__(self, folder: Path) -> None:
        self.exports = Exports(folder / "onnx")
        self.path = {"input": folder / "m.engine", "schedule": folder / "set"}
        self.report = build_engine(self.exports.path("input"), self.path["input"], RTX)
        self.reports = build_engines(self.exports.path("schedule"), self.path["schedule"], RTX)
        made = [(self.exports.report("input").path, self.report), *self._masks()]
        pairs = [(onnx, report.path) for onnx, report in made]
        for gating, report in (("input", self.report), ("schedule", self.reports[0])):
            onnx = self.exports.report(gating).prologue
            assert report.prologue is not None
            assert onnx is not None
            pairs.append((onnx, report.prologue.path))
        self.built_from = {EngineSidecar.load(engine).content: onnx for onnx, engine in pairs}

    def _masks(self) -> list[tuple[Path, BuildReport]]:
        files = ScheduleVariants.load(self.exports.path("schedule")).files.values()
        return list(zip(files, self.reports, strict=True))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def fake(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    version = EngineSidecar.load(engines.path["input"]).version
    sizes = OnnxRunner(engines.exports.path("input")).metadata.example
    trt, device = FakeTensorRT(version, engines.built_from, sizes), HostDevice()
    monkeypatch.setattr(tensorrt_runner, "load", lambda flavor: trt)
    monkeypatch.setattr(tensorrt_runner, "open_device", lambda: device)
    return trt


def answers(runner: Runner, calls: list[dict[str, Tensor]], policy: Policy = SCHEDULE) -> list[Tensor]:
    denoiser = EngineDenoiser(runner, policy)
    return [denoiser(**arguments) for arguments in calls]


# Building -----------------------------------------------------------------------------------------------------------


def test_both_engines_are_built_and_described(engines: Engines) -> None:
    engine = engines.path["input"]
    assert sorted(file.name for file in engine.parent.glob("m.*")) == [
        "m.engine", "m.engine.json", "m.prologue.engine", "m.prologue.engine.json",
    ]  # fmt: skip
    step, prologue = map(EngineSidecar.load, (engine, engine.with_name("m.prologue.engine")))
    assert step.model is not None
    assert step.model.prologue == prologue.prologue != ""
    assert (step.prologue, prologue.model) == ("", None)
    assert [(item.name, item.is_input) for item in prologue.tensors] == [
        ("text", True), ("invariant_0", False), ("invariant_1", False),
    ]  # fmt: skip
    assert "text" not in {item.name for item in step.tensors}
    assert {"invariant_0", "invariant_1"} < {item.name for item in step.tensors}
    structures = [engines.report.structure, engines.report.prologue and engines.report.prologue.structure]
    assert [structure and structure.problems for structure in structures] == [(), ()]
    assert [len(structure.branches) for structure in structures if structure] == [3, 0]


def test_engines_of_a_schedule_share_theirs(engines: Engines) -> None:
    folder = engines.path["schedule"]
    assert (folder / "prologue.engine").is_file()
    assert [report.prologue is not None for report in engines.reports] == [True, False, False]
    assert len(list(folder.glob("*.engine"))) == 4


def test_the_same_is_not_built_twice(engines: Engines) -> None:
    again = build_engine(engines.exports.path("input"), engines.path["input"], RTX)
    assert again.prologue is not None
    assert (again.skipped, again.prologue.skipped) == (True, True)


def test_a_prologue_that_cannot_be_built_leaves_the_old_engines(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = tensorrt_build.parse_network

    def refuse(trt: object, flavor: object, path: Path, *rest: object) -> object:
        if "prologue" in path.name:
            raise BackendError("not supported")
        return parse(trt, flavor, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt_build, "parse_network", refuse)
    with pytest.raises(BackendError, match="not supported"):
        build_engine(engines.exports.path("input"), tmp_path / "m.engine", RTX)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_foreign_prologue_is_not_built(engines: Engines, tmp_path: Path) -> None:
    onnx = engines.exports.path("input")
    shutil.copy(onnx, tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match=r"has no m.prologue.onnx beside it"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", RTX)
    shutil.copy(onnx, tmp_path / "m.prologue.onnx")
    with pytest.raises(ArtifactError, match=r"m.prologue.onnx is not the prologue of m.onnx"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", RTX)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.prologue.onnx"]


def test_a_preview_counts_it(engines: Engines) -> None:
    seen = preview(engines.exports.path("input"))
    plain = preview(engines.exports.path("input", hoist=False))
    assert (seen.engines, plain.engines) == (2, 1)
    roles = {tensor.name: role for tensor, role in zip(seen.tensors, seen.roles, strict=True)}
    assert (roles["invariant_0"], roles["x"], roles["cache_0_0"]) == ("invariant", "model", "cache")
    assert (seen.cache_bytes, plain.invariant_bytes) == (plain.cache_bytes, 0)
    assert seen.invariant_bytes == 2 * 4 * prompts(1)[0].numel()
    assert abs(seen.weight_bytes - plain.weight_bytes) < 1024


# Running ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", ["input", "schedule"])
def test_engines_follow_onnx_runtime_over_two_prompts(engines: Engines, fake: FakeTensorRT, gating: str) -> None:
    runner = TensorRTRunner(engines.path[gating])
    prologues = counted(runner)
    calls, (first, second) = trajectory(CONDITIONED, steps=STEPS), prompts(2)
    calls = [{**each, "text": text} for text in (first, second) for each in calls]
    calls[3]["text"] = second
    calls[4]["text"] = second
    seen = answers(runner, calls)
    assert len(prologues) == 3  # two prompts within the first trajectory, one in the second
    expected = answers(OnnxRunner(engines.exports.path(gating, hoist=False), threads=1), calls)
    assert all(map(torch.equal, seen, expected))


def test_streams_keep_theirs(engines: Engines, fake: FakeTensorRT) -> None:
    runner = TensorRTRunner(engines.path["schedule"])
    prologues = counted(runner)
    calls = [{**each, "text": text} for each in trajectory(CONDITIONED, steps=STEPS) for text in prompts(2)]
    seen = answers(runner, calls)
    assert len(prologues) == 2
    expected = answers(OnnxRunner(engines.exports.path("schedule", hoist=False), threads=1), calls)
    assert all(map(torch.equal, seen, expected))


def test_graphs_read_where_the_prologue_wrote(engines: Engines, fake: FakeTensorRT) -> None:
    """Nothing that stays the same is copied at a step, and the prologue is no graph itself."""
    runner = TensorRTRunner(engines.path["schedule"])
    plain = OnnxRunner(engines.exports.path("schedule", hoist=False), threads=1)
    for step, arguments in enumerate(trajectory(CONDITIONED, steps=STEPS)):
        inputs = {**arguments, "text": arguments["text"] + step}
        assert torch.equal(runner.run(inputs, force="compute")[0], plain.run(inputs, force="compute")[0])
    prologue, context = sorted(fake.contexts, key=lambda context: len(context.addresses))
    assert (prologue.enqueued, prologue.replayed) == (STEPS, 0), "each call has another text"
    assert context.replayed > 0
    kept = runner._stream.invariants
    assert [prologue.addresses[name] for name in kept] == [tensor.data_ptr() for tensor in kept.values()]
    assert [context.addresses[name] for name in kept] == [tensor.data_ptr() for tensor in kept.values()]


def test_a_pipeline_module_runs_it(engines: Engines, fake: FakeTensorRT) -> None:
    module = EngineModule(engines.path["input"], like=engines.exports.lazy, policy=SCHEDULE)
    calls = trajectory(CONDITIONED, steps=STEPS)
    expected = answers(OnnxRunner(engines.exports.path("input", hoist=False), threads=1), calls)
    assert all(map(torch.equal, [module(**arguments) for arguments in calls], expected))


@pytest.mark.parametrize("gating", ["input", "schedule"])
def test_a_prologue_that_is_missing_or_of_another_engine_is_refused(
    engines: Engines, fake: FakeTensorRT, tmp_path: Path, gating: str
) -> None:
    source = engines.path[gating]
    folder = shutil.copytree(source if gating == "schedule" else source.parent, tmp_path / "copy")
    path = folder if gating == "schedule" else folder / "m.engine"
    beside = folder / ("prologue.engine" if gating == "schedule" else "m.prologue.engine")
    TensorRTRunner(path)
    replace(EngineSidecar.load(beside), prologue="0123").save(beside)
    with pytest.raises(ArtifactError, match=rf"{beside.name} is not the prologue of .*: it was exported with another"):
        TensorRTRunner(path)
    beside.unlink()
    with pytest.raises(ArtifactError, match=rf" has no {beside.name} beside it, .*; copy both, or make both again"):
        TensorRTRunner(path)
