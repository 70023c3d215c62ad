"""Exported models whose prologue computes what stays the same along a trajectory: bit for bit those without."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import CacheSchedule, Learned, Policy, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import check_structure, export_onnx
from lazy_compile.backends.onnx.sizes import shape_at
from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.open_runner import open_runner
from lazy_compile.backends.triton import export_triton
from lazy_compile.errors import ArtifactError, BackendError, ConfigError
from support.hoisting import CONDITIONED, SCHEDULE, STEPS, Conditioned, Exports, counted, prompts
from support.layers import WIDTH, WORDS
from support.lowering import knots, random_gates
from support.slow import slow_but
from support.toy_models import call, trajectory


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was exported of a model with other weights."""
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    lazy = lazy_compile.transform(Conditioned().eval(), call(CONDITIONED))
    export_onnx(lazy, path, gating="input", invariants=("text",), dynamic=False)
    return path


def answers(runner: OnnxRunner, calls: Iterable[dict[str, Any]], policy: Policy) -> list[Tensor]:
    denoiser = EngineDenoiser(runner, policy)
    return [denoiser(**arguments) for arguments in calls]


def assert_same(exports: Exports, calls: list[dict[str, Any]], gating: str = "input", policy: Any = None) -> int:
    """Both exports answer alike along these calls; how often the prologue was computed."""
    policy = policy or SCHEDULE
    plain, hoisted = (OnnxRunner(exports.path(gating, hoist=hoist), threads=1) for hoist in (False, True))
    prologues = counted(hoisted)
    assert all(map(torch.equal, answers(hoisted, calls, policy), answers(plain, calls, policy)))
    return len(prologues)


# Bit for bit, and once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", slow_but(["predicate", "input"], ["predicate", "input", "schedule"]))
def test_it_is_computed_once_a_trajectory_and_changes_nothing(exports: Exports, gating: str) -> None:
    calls = trajectory(CONDITIONED, steps=STEPS)
    assert assert_same(exports, [{**each, "text": calls[0]["text"]} for each in calls], gating) == 1
    other = trajectory(CONDITIONED, steps=STEPS, seed=1)
    assert assert_same(exports, [*calls, *other], gating) == 2


@pytest.mark.parametrize(
    ("gating", "group"), slow_but([("input", 2)], [("predicate", "block"), ("input", 2), ("schedule", "block")])
)
def test_groups_are_as_they_were(exports: Exports, gating: str, group: int | str) -> None:
    reports = [exports.report(gating, hoist=hoist, group=group) for hoist in (False, True)]
    plain, hoisted = (OnnxRunner(report.path, threads=1) for report in reports)
    calls = trajectory(CONDITIONED, steps=STEPS)
    tied = Scheduled(SCHEDULE.schedule.tied(plain.metadata.leaders))
    assert all(map(torch.equal, answers(hoisted, calls, tied), answers(plain, calls, tied)))
    assert reports[0].if_nodes == reports[1].if_nodes


def test_gates_decide_as_they_did(exports: Exports) -> None:
    gates = random_gates(exports.lazy, knots(STEPS))
    calls = trajectory(CONDITIONED, steps=STEPS)
    assert assert_same(exports, calls, "predicate", Learned(gates)) == 1


@pytest.mark.slow
def test_the_last_output_is_reused_as_it_was(exports: Exports) -> None:
    reports = [exports.report("input", hoist=hoist, group=1, reuse="last") for hoist in (False, True)]
    plain, hoisted = (OnnxRunner(report.path, threads=1) for report in reports)
    calls = trajectory(CONDITIONED, steps=STEPS)
    assert all(map(torch.equal, answers(hoisted, calls, SCHEDULE), answers(plain, calls, SCHEDULE)))


def test_it_follows_pytorch(exports: Exports) -> None:
    denoiser = EngineDenoiser(OnnxRunner(exports.path("input"), threads=1), SCHEDULE)
    exports.lazy.policy = SCHEDULE
    for arguments in trajectory(CONDITIONED, steps=STEPS):
        with torch.no_grad():
            assert (denoiser(**arguments) - exports.lazy(**arguments)).abs().max() < 1e-4
    assert denoiser.stats.compute_ratio == exports.lazy.stats.compute_ratio


# Other inputs on the way ------------------------------------------------------------------------------------------


def test_two_streams_keep_theirs(exports: Exports) -> None:
    calls = trajectory(CONDITIONED, steps=STEPS)
    both = [{**each, "text": text} for each in calls for text in prompts(2)]
    assert assert_same(exports, both) == 2


def test_another_prompt_midway_is_noticed(exports: Exports) -> None:
    calls, (first, second) = trajectory(CONDITIONED, steps=STEPS), prompts(2)
    texts = [first, first, second, second, first, first.clone()]
    changed = [{**each, "text": text} for each, text in zip(calls, texts, strict=True)]
    assert assert_same(exports, changed) == 2  # each prompt is a stream of its own, and keeps its prologue


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["tensor", "array", "tensor of an array"])
def test_a_prompt_that_was_written_over_is_noticed(exports: Exports, kind: str, context: Any) -> None:
    plain, hoisted = (OnnxRunner(exports.path("input", hoist=hoist), threads=1) for hoist in (False, True))
    prologues = counted(hoisted)
    with context():
        text = prompts(1)[0].clone()
        given: Any = text if kind == "tensor" else text.numpy()
        given = torch.from_numpy(given) if kind == "tensor of an array" else given
        for step, arguments in enumerate(trajectory(CONDITIONED, steps=STEPS)):
            if step == 3:
                if kind == "tensor":
                    text.add_(1.0)
                else:
                    text.numpy()[...] += 1.0
            inputs = {**arguments, "text": given}
            (seen,), (expected,) = (each.run(inputs, force="compute") for each in (hoisted, plain))
            assert torch.equal(seen, expected), step
    assert len(prologues) == 2


def test_what_only_the_steps_read_may_change(exports: Exports) -> None:
    calls = trajectory(CONDITIONED, steps=STEPS)
    for step, each in enumerate(calls):
        each["shift"] = each["shift"] + step
        each["x"] = calls[0]["x"]  # latents that are proven to follow, whatever moves beside them
    assert assert_same(exports, calls) == 2  # until it has changed twice, it counts as a condition


def test_a_reset_computes_it_again(exports: Exports) -> None:
    runner = OnnxRunner(exports.path("input"), threads=1)
    prologues = counted(runner)
    for _ in range(2):
        runner.run(call(CONDITIONED), force="compute")
        runner.run(call(CONDITIONED), force="compute")
        runner.reset()
    assert len(prologues) == 2


def test_after_a_failure_nothing_is_known(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, hoisted = (OnnxRunner(exports.path("input", hoist=hoist), threads=1) for hoist in (False, True))
    inputs = call(CONDITIONED)
    hoisted.run(inputs, force="compute")
    assert hoisted._stream.prologue is not None
    broken = {**inputs, "text": inputs["text"] + 1}

    def fail(*_: object) -> None:
        hoisted._stream.invariants["invariant_0"].zero_()
        raise BackendError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(hoisted._stream.prologue, "run", fail)
        with pytest.raises(BackendError):
            hoisted.run(broken, force="compute")
    assert torch.equal(hoisted.run(inputs, force="compute")[0], plain.run(inputs, force="compute")[0])


# What is written --------------------------------------------------------------------------------------------------


def test_the_report_says_what_is_hoisted(exports: Exports) -> None:
    plain, hoisted = (exports.report("predicate", hoist=hoist) for hoist in (False, True))
    assert (plain.prologue, plain.invariants, plain.hoisted_tensors, plain.hoisted_macs) == (None, (), 0, 0)
    assert plain.hoisted_share == 0.0
    assert hoisted.prologue == hoisted.path.with_name("hoisted.prologue.onnx")
    assert (hoisted.invariants, hoisted.hoisted_tensors) == (("text",), 2)
    batch, words, width = call(CONDITIONED)["text"].shape
    assert hoisted.hoisted_macs == 3 * batch * words * width * width
    assert hoisted.hoisted_share == hoisted.hoisted_macs / exports.lazy.graph.total_macs
    assert hoisted.heavy_ops_inside == plain.heavy_ops_inside - 3
    assert (hoisted.heavy_ops_outside_if, check_structure(hoisted.path).problems) == ((), ())
    assert hoisted.bytes == hoisted.path.stat().st_size + hoisted.prologue.stat().st_size


def test_files_take_what_they_read_and_share_no_weight(exports: Exports) -> None:
    report = exports.report("predicate")
    assert report.prologue is not None
    step, prologue = onnx.load(report.path).graph, onnx.load(report.prologue).graph
    assert [item.name for item in prologue.input] == ["text"]
    assert [item.name for item in prologue.output] == ["invariant_0", "invariant_1"]
    assert [item.name for item in step.input][:5] == ["x", "timestep", "shift", "invariant_0", "invariant_1"]
    weights = [{item.name for item in graph.initializer if item.name.endswith("bias")} for graph in (step, prologue)]
    assert weights[1] == {"embed_text.bias", "cross.k.bias", "cross.v.bias"}
    assert weights[0].isdisjoint(weights[1])
    metadata = OnnxRunner(report.path).metadata
    assert [spec.name for spec in metadata.inputs] == ["x", "timestep", "text", "shift"]
    assert [(spec.name, spec.dtype) for spec in metadata.invariants] == [
        ("invariant_0", "float32"),
        ("invariant_1", "float32"),
    ]


def test_what_a_stream_keeps_is_accounted_for(exports: Exports) -> None:
    sizes = []
    for hoist in (True, False):
        runner = OnnxRunner(exports.path("input", hoist=hoist))
        runner.run(call(CONDITIONED), force="compute")
        sizes.append(runner._stream.bytes)
    assert sizes[0] - sizes[1] == 2 * 4 * call(CONDITIONED)["text"].numel()


def test_a_folder_has_one_prologue_and_loses_it_again(exports: Exports, tmp_path: Path) -> None:
    report = exports.report("schedule")
    assert report.prologue == report.path / "prologue.onnx"
    assert report.bytes == sum(file.stat().st_size for file in report.path.iterdir())
    assert len(list(report.path.glob("*prologue*"))) == 1
    exports.lazy.policy = Scheduled(CacheSchedule.every(1, 1, 3))
    for hoist in (True, False):
        export_onnx(
            exports.lazy, tmp_path / "set", gating="schedule", invariants=("text",) if hoist else (), dynamic=False
        )
        assert (tmp_path / "set" / "prologue.onnx").exists() == hoist
        open_runner(tmp_path / "set").run(call(CONDITIONED), force="compute")


def test_a_prologue_that_cannot_be_written_leaves_the_old_pair(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "m.onnx", tmp_path / "m.prologue.onnx"]
    for file in files:
        file.write_text("old")
    check = onnx.checker.check_model

    def refuse(path: str, **options: Any) -> None:
        if "prologue" in Path(path).name:
            raise onnx.checker.ValidationError("no")
        check(path, **options)

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(BackendError, match="not valid ONNX: no"):
        export_onnx(exports.lazy, files[0], invariants=("text",), dynamic=False)
    assert sorted(tmp_path.iterdir()) == files
    assert [file.read_text() for file in files] == ["old", "old"]


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", ["input", "schedule"])
def test_a_prologue_that_is_missing_or_of_another_model_is_refused(
    exports: Exports, foreign: Path, tmp_path: Path, gating: str
) -> None:
    report = exports.report(gating)
    assert report.prologue is not None
    source = report.path if gating == "schedule" else report.path.parent
    for file in source.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path if gating == "schedule" else tmp_path / report.path.name
    beside = tmp_path / report.prologue.name
    open_runner(path)
    beside.unlink()
    with pytest.raises(ArtifactError, match=rf" has no {beside.name} beside it, .*; copy both, or make both again"):
        open_runner(path)
    beside.write_bytes(foreign.with_name("other.prologue.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=rf"{beside.name} is not the prologue of .*: it was exported with another"):
        open_runner(path)
    beside.write_bytes(foreign.read_bytes())
    with pytest.raises(ArtifactError, match=rf"{beside.name} is not the prologue .*: export_onnx did not write it as"):
        open_runner(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("prompt",), "'prompt' is no input that could stay the same; the inputs are x, timestep, text, shift"),
        (("text", "timestep"), "'timestep' is the timestep, which changes at every step; name other inputs"),
        ("text", r"invariants is the string 'text'; give a tuple of names"),
    ],
)
def test_names_that_make_no_sense_are_refused(exports: Exports, names: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(exports.lazy, tmp_path / "m.onnx", invariants=names, dynamic=False)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_hoisted_a_warning_says_so(
    exports: Exports, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = export_onnx(exports.lazy, tmp_path / "m.onnx", invariants=("shift",), dynamic=False)
    assert "nothing of Conditioned can be hoisted" in caplog.text
    assert "shift and the weights alone decide no matrix product" in caplog.text
    assert (report.prologue, report.hoisted_tensors) == (None, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert report.inputs == exports.report("predicate", hoist=False).inputs


def test_a_server_is_refused(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes what its prologue computes, .*; export it without invariants"):
        export_triton(exports.path("input"), tmp_path, "m")
    assert not list(tmp_path.iterdir())


# Elsewhere --------------------------------------------------------------------------------------------------------


def test_phones_get_both_files(exports: Exports, tmp_path: Path) -> None:
    size = convert_to_ort(exports.path("input"), tmp_path / "m.ort")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.ort", "m.prologue.ort"]
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    calls = trajectory(CONDITIONED, steps=STEPS)
    seen = answers(open_runner(tmp_path / "m.ort"), calls, SCHEDULE)
    expected = answers(open_runner(exports.path("input", hoist=False)), calls, SCHEDULE)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(seen, expected, strict=True))


def test_half_precision(tmp_path: Path) -> None:
    lazy = lazy_compile.transform(CONDITIONED.model().half(), _halved(call(CONDITIONED)))
    export_onnx(lazy, tmp_path / "m.onnx", gating="input", invariants=("text",), dynamic=False)
    runner = open_runner(tmp_path / "m.onnx")
    assert {spec.dtype for spec in runner.metadata.invariants} == {"float16"}
    for arguments in map(_halved, trajectory(CONDITIONED, steps=2)):
        with torch.no_grad():
            (seen,), expected = runner.run(arguments, force="compute"), lazy.original(**arguments)
        assert (seen - expected).abs().max() < 2e-2


def _halved(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "timestep" else value.half() for name, value in inputs.items()}


def test_complex_numbers_are_handed_over_as_pairs(tmp_path: Path) -> None:
    lazy = lazy_compile.transform(Rotated().eval(), call(CONDITIONED), batch_rule="all_reuse")
    export_onnx(lazy, tmp_path / "m.onnx", gating="input", invariants=("text",), dynamic=False)
    runner = open_runner(tmp_path / "m.onnx")
    shapes = [shape_at(spec.shape, runner.metadata.example) for spec in runner.metadata.invariants]
    assert shapes == [(2, WORDS, WIDTH // 2, 2)]
    for arguments in trajectory(CONDITIONED, steps=2):
        with torch.no_grad():
            (seen,), expected = runner.run(arguments, force="compute"), lazy.original(**arguments)
        assert (seen - expected).abs().max() < 1e-4


class Rotated(Conditioned):
    """The embedded text is turned by complex numbers, by an angle that depends on the time."""

    def condition(self, text: Tensor, timestep: Tensor) -> Tensor:
        numbers = torch.view_as_complex(self.embed_text(text).unflatten(-1, (-1, 2)))
        turned = numbers * torch.polar(torch.ones_like(timestep), timestep)[:, None, None]
        return torch.view_as_real(turned).flatten(-2)
