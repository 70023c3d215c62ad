"""ONNX export and ONNX Runtime against PyTorch, over whole trajectories."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, GateTable, LazyModule, Learned, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx import save as onnx_save
from lazy_compile.backends.onnx.export import OnnxReport, check_structure, export_onnx
from lazy_compile.backends.onnx.metadata import KEY
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ArtifactError, BackendError, ConfigError
from lazy_compile.policies.policy import GateQuery, Policy
from support.lowering import STEPS, knots, random_gates
from support.slow import slow_but
from support.small_model import SMALL, Small
from support.toy_models import TOYS, call, randomize, trajectory

TOLERANCE = 1e-4

Exported = Callable[[str, str], tuple[LazyModule, Path, OnnxReport]]


def follow(lazy: LazyModule, denoiser: EngineDenoiser, policy: Policy, calls: list[dict[str, Any]]) -> float:
    """Run both under one policy; the largest difference between their outputs. The decisions must be the same."""
    largest = 0.0
    for model in (lazy, denoiser):
        model.policy = policy
        model.reset_stats()
    for arguments in calls:
        with torch.no_grad():
            expected = lazy(**arguments)
        seen = denoiser(**arguments)
        assert type(seen) is type(expected)
        largest = max(largest, float((torch.as_tensor(seen) - expected).abs().max()))
    np.testing.assert_array_equal(denoiser.stats.reuse_table, lazy.stats.reuse_table)
    return largest


# Parity ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toy", "reuse"),
    slow_but([("dit", "linear"), ("mmdit", "linear")], [("dit", "last"), ("dit", "linear"), ("mmdit", "linear")]),
)
def test_onnx_runtime_follows_pytorch(exported: Exported, toy: str, reuse: str) -> None:
    lazy, path, report = exported(toy, reuse)
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1), config=lazy.lazy_config)
    branches = len(lazy.branches)
    for policy, lazy_ratio in (
        (AlwaysCompute(), (0.0, 0.0)),
        (Scheduled(CacheSchedule.random(0.5, STEPS, branches, seed=0)), (0.5, 0.5)),
        (Learned(random_gates(lazy, knots())), (0.1, 0.9)),
        (Learned(random_gates(lazy, knots(), seed=1), shift=0.5), (0.1, 0.9)),
    ):
        assert follow(lazy, denoiser, policy, trajectory(TOYS[toy], steps=STEPS)) < TOLERANCE
        assert lazy_ratio[0] <= denoiser.stats.lazy_ratio <= lazy_ratio[1]
    assert (report.if_nodes, report.branches, report.heavy_ops_outside_if) == (branches, branches, ())


def test_gates_of_two_trajectories_serve_both_and_a_third_is_told_of(
    exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    lazy, path, _ = exported("dit", "linear")
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1), config=lazy.lazy_config)
    tables = [random_gates(lazy, knots(steps), seed=steps) for steps in (10, STEPS)]
    both = Learned(GateTable.joined(tables))
    for table in tables:
        tables_of_reuse, calls = [], trajectory(TOYS["dit"], steps=len(table.knots))
        for policy in (both, Learned(table)):
            assert follow(lazy, denoiser, policy, calls) < TOLERANCE
            tables_of_reuse.append(lazy.stats.reuse_table)
        np.testing.assert_array_equal(*tables_of_reuse)
    assert not caplog.records
    follow(lazy, denoiser, both, trajectory(TOYS["dit"], steps=7))
    follow(lazy, denoiser, Scheduled(CacheSchedule.every(2, 5, len(lazy.branches))), calls)
    said = [record.getMessage() for record in caplog.records]  # by either model of either policy, once
    assert ["calibrated on other timesteps" in each for each in said] == [True, True, False, False]
    assert ["the schedule has 5 steps" in each for each in said] == [False, False, True, True]


def test_it_is_the_original_while_all_compute(exported: Exported) -> None:
    lazy, path, _ = exported("dit", "linear")
    runner = OnnxRunner(path, threads=1)
    for arguments in trajectory(TOYS["dit"], steps=3):
        (output,) = runner.run(arguments, force="compute")
        with torch.no_grad():
            torch.testing.assert_close(output, lazy.original(**arguments), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{"warmup_steps": 3}, {"max_reuse_age": 2}])
def test_limits_hold(exported: Exported, options: dict[str, int]) -> None:
    lazy, path, _ = exported("dit", "linear")
    config = lazy.lazy_config
    lazy.lazy_config = lazy_compile.LazyConfig(**options)
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1), config=lazy.lazy_config)
    schedule = CacheSchedule.every(STEPS, STEPS, len(lazy.branches))
    try:
        assert follow(lazy, denoiser, Scheduled(schedule), trajectory(TOYS["dit"], steps=STEPS)) < TOLERANCE
    finally:
        lazy.lazy_config = config
    assert 0 < denoiser.stats.lazy_ratio < 0.9


def test_limits_are_those_of_the_export_unless_told_otherwise(tmp_path: Path) -> None:
    lazy = lazy_compile.transform(TOYS["dit"].build(), call(TOYS["dit"]), warmup_steps=2, max_reuse_age=3)
    export_onnx(lazy, tmp_path / "m.onnx", dynamic=False)
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx", threads=1))
    schedule = CacheSchedule.every(STEPS, STEPS, len(lazy.branches))
    assert follow(lazy, denoiser, Scheduled(schedule), trajectory(TOYS["dit"], steps=STEPS)) < TOLERANCE
    assert denoiser.stats.reuse_table[:10, 0].tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    told = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx", threads=1), config=lazy_compile.LazyConfig())
    assert (told.config.warmup_steps, told.config.max_reuse_age) == (1, None)


def test_two_streams_and_a_second_trajectory_do_not_mix(exported: Exported) -> None:
    lazy, path, _ = exported("dit", "linear")
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1), config=lazy.lazy_config)
    first, second = (trajectory(TOYS["dit"], steps=STEPS, seed=seed) for seed in (0, 1))
    interleaved = [arguments for pair in zip(first, second, strict=True) for arguments in pair]
    policy = Learned(random_gates(lazy, knots()))
    assert follow(lazy, denoiser, policy, interleaved + interleaved[::-1][:1] + first) < TOLERANCE
    assert len(denoiser.runner.streams) >= 2


def test_a_stream_that_misses_steps_extrapolates_over_them(exported: Exported) -> None:
    lazy, path, _ = exported("dit", "linear")
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1), config=lazy.lazy_config)
    calls = trajectory(TOYS["dit"], steps=8)
    unconditional = trajectory(TOYS["dit"], steps=8, seed=1)
    mixed = [
        arguments
        for step in range(8)
        for arguments in ([calls[step]] if step in (3, 5) else [calls[step], unconditional[step]])
    ]
    table = np.ones((8, 4), dtype=bool)
    table[[4, 6]] = False
    assert follow(lazy, denoiser, Scheduled(CacheSchedule(table)), mixed) < TOLERANCE


def test_arguments_may_be_given_by_position(exported: Exported) -> None:
    _, path, _ = exported("dit", "last")
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
    arguments = call(TOYS["dit"])
    by_name = denoiser(**arguments)
    denoiser.reset()
    assert torch.equal(denoiser(*arguments.values()), by_name)


# The runner -----------------------------------------------------------------------------------------------------------


def test_decisions_can_be_forced_one_by_one(exported: Exported) -> None:
    lazy, path, _ = exported("dit", "last")
    runner, arguments = OnnxRunner(path, threads=1), call(TOYS["dit"])
    row = random_gates(lazy, knots()).row(0.0)
    runner.run(arguments, row, force="reuse")
    assert runner.decisions.all(), "nothing is cached yet"
    runner.run(arguments, row, force=[True, False, None, None])
    assert runner.logits is not None
    assert runner.logits.shape == (2, 4)
    assert runner.decisions.tolist() == [True, False, *(runner.logits[:, 2:] > 0).any(dim=0).tolist()]
    runner.run(arguments, force="reuse")
    assert not runner.decisions.any()
    runner.reset()
    runner.run(arguments, force="reuse")
    assert runner.decisions.all()


def test_what_is_reused_is_what_was_computed(exported: Exported) -> None:
    _, path, _ = exported("dit", "last")
    runner, arguments = OnnxRunner(path, threads=1), call(TOYS["dit"])
    (computed,) = runner.run(arguments, force="compute")
    (reused,) = runner.run({name: value.numpy() for name, value in arguments.items()}, force="reuse")
    assert torch.equal(reused, computed)
    other = runner.run(arguments, force="reuse", stream=runner.new_stream())
    assert torch.equal(other[0], computed)
    assert runner.decisions.all(), "the other stream was empty"


def test_it_runs_under_inference_mode_and_outside(exported: Exported) -> None:
    _, path, _ = exported("dit", "linear")
    with torch.inference_mode():
        denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
        denoiser(**call(TOYS["dit"]))
    denoiser.runner.reset()
    denoiser(**call(TOYS["dit"], step=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x": a["x"]}, "the inputs are x; expected t, x, y"),
        (
            lambda a: {**a, "x": a["x"][:1]},
            r"input 'x' is float32\[1, 3, 8, 8\]; the model was exported for float32",
        ),
        (
            lambda a: {**a, "y": a["y"].float()},
            r"input 'y' is float32\[2\]; the model was exported for int64\[2\]: pass int64",
        ),
    ],
)
def test_inputs_of_another_form_are_refused(exported: Exported, change: Any, message: str) -> None:
    runner = OnnxRunner(exported("dit", "last")[1], threads=1)
    with pytest.raises(ConfigError, match=message):
        runner.run(change(call(TOYS["dit"])))


def test_policies_that_cannot_be_followed_are_refused(exported: Exported) -> None:
    class Asks(Policy):
        def should_compute(self, query: GateQuery) -> bool:
            return True

    denoiser = EngineDenoiser(OnnxRunner(exported("dit", "last")[1], threads=1))
    with pytest.raises(ConfigError, match="Asks decides by the activations in a branch"):
        denoiser.policy = Asks()
    with pytest.raises(ConfigError, match="the schedule has 3 branches, the model has 4"):
        denoiser.policy = Scheduled(CacheSchedule.every(2, 4, 3))
    with pytest.raises(ConfigError, match="force has 3 entries; expected one for each of the 4 branches"):
        denoiser.runner.run(call(TOYS["dit"]), force=[True] * 3)


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_names_everything(exported: Exported) -> None:
    lazy, path, report = exported("dit", "linear")
    slots = [name for branch in range(4) for name in (f"cache_{branch}_0", f"delta_{branch}_0")] + [
        "age",
        "gap",
        "moved",
    ]
    assert report.inputs == ("x", "t", "y", *slots, "slope", "gate_weight", "gate_bias")
    assert report.outputs == ("output_0", *(f"next_{name}" for name in slots), "compute_logits")
    model = onnx.load(path)
    parameters = {name for name, _ in lazy.original.named_parameters()}
    named = {item.name.removesuffix(".folded") for item in model.graph.initializer}
    assert parameters <= named
    metadata = OnnxRunner(path, threads=1).metadata
    assert metadata.branches == lazy.branches
    assert (metadata.timestep_input, metadata.arguments, metadata.reuse) == ("t", ("x", "t", "y"), "linear")
    assert {slot.initial for slot in metadata.slots if slot.input in ("age", "gap")} == {float("inf")}
    assert not any("/" in text.value for node in model.graph.node for text in node.metadata_props)


@pytest.mark.parametrize("opset", [18, 22])
def test_opsets(tmp_path: Path, compiled: Callable[..., LazyModule], opset: int) -> None:
    export_onnx(compiled("windowed"), tmp_path / "m.onnx", opset=opset, dynamic=False)
    assert {item.domain: item.version for item in onnx.load(tmp_path / "m.onnx").opset_import} == {"": opset}
    OnnxRunner(tmp_path / "m.onnx", threads=1).run(call(TOYS["windowed"]))


class DividesByAlmostNothing(Small):
    """A safe division, as linear attention has it: zero over zero."""

    def enter(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        zero = torch.relu(-x.abs())
        return super().enter(x, t) + zero / (zero + 1e-15) + zero / (1.0 - 1.0 + zero - -1e-9)


def test_tiny_addends_are_kept(tmp_path: Path) -> None:
    lazy = lazy_compile.transform(randomize(DividesByAlmostNothing()).eval(), call(SMALL))
    export_onnx(lazy, tmp_path / "m.onnx", gating="input", dynamic=False)
    (output,) = OnnxRunner(tmp_path / "m.onnx", threads=1).run(call(SMALL), force="compute")
    with torch.no_grad():
        torch.testing.assert_close(output, lazy(**call(SMALL)), atol=TOLERANCE, rtol=0.0)


def test_another_example_call_fixes_other_sizes(tmp_path: Path, compiled: Callable[..., LazyModule]) -> None:
    lazy, arguments = compiled("windowed"), call(TOYS["windowed"], batch=1)
    export_onnx(lazy, tmp_path / "m.onnx", arguments, dynamic=False)
    (output,) = OnnxRunner(tmp_path / "m.onnx", threads=1).run(arguments)
    with torch.no_grad():
        torch.testing.assert_close(output, lazy.original(**arguments), rtol=TOLERANCE, atol=TOLERANCE)


def test_large_weights_stand_beside_the_file(
    tmp_path: Path, compiled: Callable[..., LazyModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_save, "EXTERNAL_BYTES", 0)
    for _ in range(2):
        report = export_onnx(compiled("windowed"), tmp_path / "m.onnx", dynamic=False)
        assert len(list(tmp_path.iterdir())) == 2, "the weights of the file before are gone"
        assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        OnnxRunner(tmp_path / "m.onnx", threads=1).run(call(TOYS["windowed"]))


def test_a_model_that_fails_its_check_leaves_the_old_file(
    tmp_path: Path, compiled: Callable[..., LazyModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("it is wrong")

    monkeypatch.setattr(onnx_save, "EXTERNAL_BYTES", 0)
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(BackendError, match="the exported model is not valid ONNX: it is wrong; try opset=22"):
        export_onnx(compiled("windowed"), tmp_path / "m.onnx")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_an_opset_that_tensorrt_cannot_take_is_refused(compiled: Callable[..., LazyModule]) -> None:
    with pytest.raises(ConfigError, match="opset is 23; expected 18 to 22"):
        export_onnx(compiled("dit"), "never.onnx", opset=23)


def test_onnxsim_keeps_the_branches(tmp_path: Path, compiled: Callable[..., LazyModule]) -> None:
    report = export_onnx(compiled("windowed"), tmp_path / "m.onnx", simplify=True, dynamic=False)
    assert report.simplified
    assert (report.if_nodes, report.heavy_ops_outside_if) == (2, ())
    OnnxRunner(tmp_path / "m.onnx", threads=1).run(call(TOYS["windowed"]))


def test_files_that_are_no_lazy_models_are_refused(exported: Exported, tmp_path: Path) -> None:
    good = exported("dit", "last")[1]
    damaged, foreign, altered = (tmp_path / f"{name}.onnx" for name in ("damaged", "foreign", "altered"))
    damaged.write_bytes(good.read_bytes()[:-1000])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "g", [x], [y])
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(plain, foreign)
    model = onnx.load(good)
    (entry,) = [item for item in model.metadata_props if item.key == KEY]
    entry.value = json.dumps({**json.loads(entry.value), "branches": 3})
    onnx.save(model, altered)
    for path, message in (
        (tmp_path / "none.onnx", "there is no file"),
        (damaged, "export the model again"),
        (foreign, "was not written by export_onnx"),
        (altered, "the digest does not match"),
    ):
        for read in (partial(OnnxRunner, threads=1), check_structure):
            with pytest.raises(ArtifactError) as caught:
                read(path)
            assert message in str(caught.value) or path.name == "none.onnx"
            assert "\n" not in str(caught.value)
