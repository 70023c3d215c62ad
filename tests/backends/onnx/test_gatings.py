"""Who decides, and for how many branches at once: ONNX Runtime follows PyTorch over whole trajectories in each form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, LazyConfig, LazyModule, Learned, Policy, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import OnnxReport, check_structure, export_onnx
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.storage import load_json
from support.lowering import knots, random_gates
from support.slow import slow_but
from support.toy_models import TOYS, call, trajectory

STEPS, TOLERANCE = 8, 1e-4
SLOPES = np.random.default_rng(0).uniform(-0.5, 1.5, (STEPS, 4))


def three_patterns(branches: int) -> np.ndarray:
    """Decisions in which only three steps differ: each is a file of its own where a schedule gates."""
    return CacheSchedule.random(0.5, STEPS, branches, seed=2).should_compute[[0, 1, 4, 4, 1, 4, 4, 1]]


TABLE = CacheSchedule(three_patterns(4), SLOPES)

Exported = Callable[..., tuple[LazyModule, Path, OnnxReport]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """``exported("dit", "input", 2)``: a lazy toy, what was written for it, and the report; linear reuse."""
    models: dict[str, LazyModule] = {}
    made: dict[tuple[Any, ...], tuple[Path, OnnxReport]] = {}

    def get(
        toy: str, gating: str, group: int | str = 1, predictors: bool = True
    ) -> tuple[LazyModule, Path, OnnxReport]:
        if toy not in models:
            models[toy] = lazy_compile.transform(TOYS[toy].model(), call(TOYS[toy]))
        lazy, key = models[toy], (toy, gating, group, predictors)
        lazy.lazy_config = LazyConfig(batch_rule="all_reuse", group=group)
        if key not in made:
            lazy.policy = Scheduled(TABLE) if gating == "schedule" else AlwaysCompute()
            path = tmp_path_factory.mktemp("onnx") / (toy if gating == "schedule" else f"{toy}.onnx")
            options = {"predictors": predictors} if gating == "input" else {}
            made[key] = path, export_onnx(lazy, path, gating=gating, **options, dynamic=False)
        lazy.policy = AlwaysCompute()
        lazy.reset_stats()
        return lazy, *made[key]

    return get


def follow(lazy: LazyModule, path: Path, policy: Policy, toy: str = "dit") -> float:
    """The largest difference between both over a trajectory; their decisions must be the same."""
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1), policy, lazy.lazy_config)
    lazy.policy = policy
    largest = 0.0
    for arguments in trajectory(TOYS[toy], steps=STEPS):
        with torch.no_grad():
            expected = lazy(**arguments)
        largest = max(largest, float((torch.as_tensor(denoiser(**arguments)) - expected).abs().max()))
    np.testing.assert_array_equal(denoiser.stats.reuse_table, lazy.stats.reuse_table)
    return largest


GATINGS = ("predicate", "input", "schedule")
EVERY_RUN = [("predicate", 1), ("input", 2), ("schedule", 1)]
CASES = slow_but(EVERY_RUN, product(GATINGS, (1, 2, "block", 4)))


@pytest.mark.parametrize(("gating", "group"), CASES)
def test_onnx_runtime_follows_pytorch(exported: Exported, gating: str, group: int | str) -> None:
    lazy, path, report = exported("dit", gating, group)
    schedule = Scheduled(TABLE)
    assert follow(lazy, path, schedule) < TOLERANCE
    assert 0.1 < lazy.stats.lazy_ratio < 0.9
    gates = {1: 4, 2: 2, "block": 2, 4: 1}[group]
    assert report.if_nodes == (0 if gating == "schedule" else gates)
    assert report.heavy_ops_outside_if == ()
    if gating != "schedule":
        policy = Learned(random_gates(lazy, knots(STEPS)), delayed=gating == "input")
        lazy.reset_stats()
        assert follow(lazy, path, policy) < TOLERANCE
        assert 0.1 < lazy.stats.lazy_ratio < 0.9


@pytest.mark.parametrize("gating", slow_but(["predicate"], GATINGS))
def test_a_group_over_several_streams_follows_pytorch(exported: Exported, gating: str) -> None:
    lazy, path, report = exported("mmdit", gating, "block") if gating != "schedule" else _scheduled_mmdit(exported)
    schedule = CacheSchedule(three_patterns(5))
    assert follow(lazy, path, Scheduled(schedule), "mmdit") < TOLERANCE
    assert report.if_nodes == (0 if gating == "schedule" else 2)


def _scheduled_mmdit(exported: Exported) -> tuple[LazyModule, Path, OnnxReport]:
    lazy, path, _ = exported("mmdit", "predicate", "block")
    lazy.policy = Scheduled(CacheSchedule(three_patterns(5)))
    folder = path.with_name("mmdit")
    return lazy, folder, export_onnx(lazy, folder, gating="schedule", dynamic=False)


def test_a_group_given_to_the_export_is_that_of_the_model(compiled: Callable[..., LazyModule], tmp_path: Path) -> None:
    lazy = compiled("windowed", batch_rule="all_reuse")
    assert export_onnx(lazy, tmp_path / "m.onnx", group=2, dynamic=False).if_nodes == 1
    lazy.lazy_config = LazyConfig(batch_rule="all_reuse", group=2)
    assert follow(lazy, tmp_path / "m.onnx", Scheduled(CacheSchedule.every(3, STEPS, 2)), "windowed") < TOLERANCE


# What goes in and out -------------------------------------------------------------------------------------------------


def test_inputs_of_each_gating(exported: Exported) -> None:
    slots = [f"{kind}_{branch}_0" for branch in range(4) for kind in ("cache", "delta")] + ["age", "gap", "moved"]
    own, rows = ("x", "t", "y"), ("gate_weight", "gate_bias")
    booleans = ("should_compute_0", "should_compute_2")
    slots.append("slope")
    assert exported("dit", "predicate")[2].inputs == (*own, *slots, *rows)
    assert exported("dit", "input", 2)[2].inputs == (*own, *slots, *booleans, *rows)
    lean = exported("dit", "input", 2, predictors=False)[2]
    assert lean.inputs == (*own, *slots, *booleans)
    assert "compute_logits" not in lean.outputs
    model = onnx.load(exported("dit", "input", 2)[1])
    types = {item.name: item.type.tensor_type for item in model.graph.input}
    assert types["should_compute_0"].elem_type == onnx.TensorProto.BOOL
    assert len(types["should_compute_0"].shape.dim) == 0


def test_predictors_are_there_if_the_policy_is_learned(compiled: Callable[..., LazyModule], tmp_path: Path) -> None:
    lazy = compiled("windowed")
    assert "compute_logits" not in export_onnx(lazy, tmp_path / "m.onnx", gating="input", dynamic=False).outputs
    lazy.policy = Learned(random_gates(lazy, knots(STEPS)))
    assert "compute_logits" in export_onnx(lazy, tmp_path / "m.onnx", gating="input", dynamic=False).outputs


def test_a_model_for_each_distinct_row(exported: Exported) -> None:
    lazy, folder, report = exported("dit", "schedule")
    masks = ScheduleVariants.load(folder)
    distinct = len({tuple(row) for row in TABLE.should_compute.tolist()})
    assert report.masks == len(masks.files) == distinct < STEPS
    assert masks.schedule == TABLE
    for mask, file in masks.files.items():
        structure = check_structure(file)
        assert (structure.if_nodes, structure.problems) == (0, ())
        heavy = {True: 6, False: 0}, {True: 2, False: 0}
        inside = sum(heavy[branch % 2][computes] for branch, computes in enumerate(mask))
        assert structure.always_on == inside + 7
    data = list(folder.glob("weights.*.data"))
    assert len(data) == 1, "all share one file of weights"
    dense = sum(parameter.nbytes for parameter in lazy.original.parameters())
    assert data[0].stat().st_size < 1.5 * dense + 50 * 4096


def test_writing_a_set_again_removes_what_was_there(compiled: Callable[..., LazyModule], tmp_path: Path) -> None:
    lazy = compiled("windowed")
    for table in ([[True, True], [True, False]], [[True, True]]):
        lazy.policy = Scheduled(CacheSchedule(np.array(table)))
        export_onnx(lazy, tmp_path / "set", gating="schedule", dynamic=False)
    names = sorted(file.name.split(".")[0] for file in (tmp_path / "set").iterdir())
    assert names == ["mask-3", "schedule", "weights"]


def test_decisions_without_a_model_compute_everything(exported: Exported) -> None:
    _, folder, _ = exported("dit", "schedule")
    runner = OnnxRunner(folder, threads=1)
    arguments = call(TOYS["dit"])
    runner.run(arguments, force="compute")
    missing = next(
        mask
        for mask in ((True, False, False, False), (False, True, True, True), (False,) * 4)
        if mask not in runner.sessions
    )
    runner.run(arguments, force=missing)
    assert runner.decisions.all()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_options_that_contradict_each_other_are_refused(compiled: Callable[..., LazyModule]) -> None:
    lazy = compiled("dit")
    for options, message in (
        ({"gating": "host"}, "gating is 'host'; expected one of 'predicate', 'input', 'schedule'"),
        ({"gating": "schedule"}, "gating='schedule' fixes a schedule, the model's policy is AlwaysCompute; set lazy"),
        ({"group": 0}, "group is 0; expected the number of branches"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_onnx(lazy, "never.onnx", **options)


@pytest.mark.parametrize(
    ("gating", "predictors", "delayed"),
    [("predicate", True, True), ("input", True, False), ("input", False, True), ("schedule", True, True)],
)
def test_gates_that_know_too_late_are_refused(exported: Exported, gating: str, predictors: bool, delayed: bool) -> None:
    lazy, path, _ = exported("dit", gating, 2 if gating == "input" else 1, predictors=predictors)
    with pytest.raises(ConfigError, match=rf"Learned\(..., delayed={delayed}\) cannot steer a model that was exported"):
        EngineDenoiser(OnnxRunner(path, threads=1), Learned(random_gates(lazy, knots(STEPS)), delayed=delayed))


def test_a_host_that_does_not_decide_is_refused(exported: Exported) -> None:
    lazy, path, _ = exported("dit", "input", 2)
    runner = OnnxRunner(path, threads=1)
    runner.run(call(TOYS["dit"]))
    with pytest.raises(ConfigError, match="the host decides before the step; give force for every branch"):
        runner.run(call(TOYS["dit"]), random_gates(lazy, knots(STEPS)).row(0.0))


def test_a_damaged_set_is_refused(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported("dit", "schedule")[1], tmp_path / "set")
    manifest = tmp_path / "set" / "schedule.json"
    good = load_json(manifest)
    gone = {**good["files"], next(iter(good["files"])): "gone.onnx"}
    for change, message in (
        ({"files": {}}, r"schedule.json is damaged \(KeyError"),
        ({"files": gone}, "names 'gone.onnx', which is missing; export again"),
        ({"should_compute": [[2]]}, "this is not a schedule"),
    ):
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactError, match=message):
            OnnxRunner(tmp_path / "set")
    manifest.unlink()
    with pytest.raises(ArtifactError, match=r"holds no schedule.json; export with gating='schedule'"):
        OnnxRunner(tmp_path / "set")


def test_a_full_disk_leaves_no_weights(
    compiled: Callable[..., LazyModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = compiled("windowed")
    lazy.policy = Scheduled(CacheSchedule.every(2, 4, 2))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lazy_compile.backends.onnx.export.save_model", full)
    with pytest.raises(
        ArtifactError, match=r"cannot write .*weights.*: No space left on device; nothing was left behind"
    ):
        export_onnx(lazy, tmp_path / "set", gating="schedule", dynamic=False)
    assert not list((tmp_path / "set").iterdir())
