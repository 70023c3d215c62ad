"""Model repositories for Triton: their configuration as Triton reads it, and its protocol replayed in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, GateTable, Learned, Policy, Scheduled
from lazy_compile.backends import triton
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.metadata import KEY
from lazy_compile.backends.onnx.sizes import shape_at
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.triton import export_triton, model_file
from lazy_compile.digests import verification
from lazy_compile.errors import ArtifactError, ConfigError
from support.command_line import answer, refusal
from support.lowering import knots, random_gates
from support.toy_models import TOYS, Toy, call, trajectory

STEPS, TOLERANCE = 8, 1e-5
TOY = TOYS["dit"]
TABLE = CacheSchedule.random(0.5, STEPS, 4, seed=2)
NUMPY = {1: np.bool_, 10: np.float16, 11: np.float32, 9: np.int64, 8: np.int32}  # Triton's DataType


class Models:
    """One toy, exported in each gating."""

    def __init__(self, folder: Path) -> None:
        self.lazy = lazy_compile.transform(TOY.model(), call(TOY), batch_rule="all_reuse")
        self.path = {gating: folder / f"{gating}.onnx" for gating in ("predicate", "input")}
        export_onnx(self.lazy, self.path["predicate"], group=2, dynamic=False)
        export_onnx(self.lazy, self.path["input"], gating="input", predictors=False)

    def learned(self, interpolation: str = "nearest", shift: float = 0.0, rising: bool = False) -> Learned:
        points = knots(STEPS)[:: 1 if interpolation == "nearest" else 3]
        table = random_gates(self.lazy, points.flip(0) if rising else points)
        return Learned(GateTable(table.features, table.knots, table.weight, table.bias, interpolation), shift)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("onnx"))


def model_config() -> ModuleType:
    """Triton's own description of its configuration; the package around it wants gRPC, which is not needed here."""
    spec = importlib.util.find_spec("tritonclient")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    found = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def read_config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config().ModelConfig())


@dataclass
class Server:
    """What Triton does with a sequence, as its documentation has it, for the ONNX Runtime backend."""

    folder: Path
    states: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = read_config(self.folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(model_file(self.folder)[1]), options)

    def infer(self, sequence: int, start: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        (control,) = self.config.sequence_batching.control_input
        described = self.config.sequence_batching.state
        if start:
            self.states[sequence] = {
                item.input_name: np.zeros(tuple(item.initial_state[0].dims), NUMPY[item.initial_state[0].data_type])
                for item in described
            }
        assert set(inputs) == {item.name for item in self.config.input}
        shaped = {item.name: np.asarray(inputs[item.name], NUMPY[item.data_type]) for item in self.config.input}
        for item in self.config.input:
            if item.HasField("reshape"):
                shaped[item.name] = shaped[item.name].reshape(tuple(item.reshape.shape))
            elif -1 not in item.dims:
                shaped[item.name] = shaped[item.name].reshape(tuple(item.dims))
        flag = {control.name: np.array([control.control[0].bool_false_true[start]])}
        names = [item.name for item in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(None, {**shaped, **flag, **self.states[sequence]}), strict=True))
        self.states[sequence] = {item.input_name: results[item.output_name] for item in described}
        return {item.name: results[item.name] for item in self.config.output}


def expected(
    models: Models, gating: str, policy: Policy, shift: float = 0.0, toy: Toy = TOY, batch: int = 2
) -> list[torch.Tensor]:
    """The trajectory by our own runner; ``shift`` makes it another request."""
    denoiser = EngineDenoiser(OnnxRunner(models.path[gating], threads=1), policy)
    calls = [{**arguments, "x": arguments["x"] + shift} for arguments in trajectory(toy, batch, steps=STEPS)]
    result = [torch.as_tensor(denoiser(**arguments)) for arguments in calls]
    if not isinstance(policy, AlwaysCompute):
        assert 0.05 < denoiser.stats.lazy_ratio < 0.9
    return result


POLICIES: list[tuple[str, Callable[[Models], Policy]]] = [
    ("predicate", lambda models: models.learned()),
    ("predicate", lambda models: models.learned("linear", shift=0.25)),
    ("predicate", lambda models: models.learned("linear", rising=True)),
    ("input", lambda models: Scheduled(TABLE)),
    ("input", lambda models: Scheduled(CacheSchedule(TABLE.should_compute[:5]))),
    (
        "input",
        lambda models: Scheduled(CacheSchedule(TABLE.should_compute, np.random.default_rng(0).random((STEPS, 4)))),
    ),
    ("input", lambda models: AlwaysCompute()),
]


@pytest.mark.parametrize(("gating", "policy"), POLICIES)
def test_two_interleaved_sequences_are_two_trajectories(
    models: Models, tmp_path: Path, gating: str, policy: Callable[[Models], Policy]
) -> None:
    rule = policy(models)
    report = export_triton(models.path[gating], tmp_path, "dit", policy=rule)
    assert (report.inputs, report.embedded) == (("x", "t", "y"), True)
    server = Server(report.path)
    wanted = {7: expected(models, gating, rule), 9: expected(models, gating, rule, 0.5)}
    requests = trajectory(TOY, steps=STEPS)
    for moment in range(STEPS + 3):
        for sequence, late in ((7, 0), (9, 3)):  # the second starts three requests later
            step = moment - late
            if 0 <= step < STEPS:
                own = {**requests[step], "x": requests[step]["x"] + (0.5 if sequence == 9 else 0.0)}
                seen = server.infer(sequence, step == 0, {name: value.numpy() for name, value in own.items()})
                difference = torch.from_numpy(seen["output_0"]) - wanted[sequence][step]
                assert difference.abs().max() < TOLERANCE, (sequence, step)


def test_sequences_may_have_other_sizes(models: Models, tmp_path: Path) -> None:
    rule = Scheduled(TABLE)
    server = Server(export_triton(models.path["input"], tmp_path, "dit", policy=rule).path)
    large = replace(TOY, shapes={**TOY.shapes, "x": (3, 12, 8)})
    for sequence, (toy, batch) in enumerate(((TOY, 2), (large, 3))):
        wanted = expected(models, "input", rule, toy=toy, batch=batch)
        for step, arguments in enumerate(trajectory(toy, batch, steps=STEPS)):
            given = {name: value.numpy() for name, value in arguments.items()}
            seen = server.infer(sequence, step == 0, given)["output_0"]
            assert np.abs(seen - wanted[step].numpy()).max() < TOLERANCE, (sequence, step)


def test_a_start_computes_whatever_the_server_has_kept(models: Models, tmp_path: Path) -> None:
    report = export_triton(models.path["input"], tmp_path, "dit", policy=Scheduled(TABLE))
    server, requests = Server(report.path), trajectory(TOY, steps=STEPS)
    inputs = [{name: value.numpy() for name, value in arguments.items()} for arguments in requests]

    def run(steps: int) -> list[Any]:
        return [server.infer(1, step == 0, given)["output_0"] for step, given in enumerate(inputs[:steps])]

    first = run(STEPS)
    run(4)
    assert not TABLE.should_compute[4].all()
    session, fed = server.session, {**inputs[0], **server.states[1]}
    names = [item.name for item in session.get_outputs()]
    again = dict(zip(names, session.run(None, {**fed, "START": np.array([True])}), strict=True))
    np.testing.assert_array_equal(again["output_0"], first[0])
    assert again["next_step"].tolist() == [1]
    for name in ("next_gap", "next_age", "next_moved"):
        np.testing.assert_array_equal(again[name], [{"next_gap": np.inf}.get(name, 0.0)] * 4)
    without = session.run(["output_0"], {**fed, "START": np.array([False])})[0]
    assert np.abs(without - first[0]).max() > TOLERANCE, "the same request in the middle of a trajectory reuses"
    assert all(map(np.array_equal, run(STEPS), first))


@pytest.mark.parametrize("gating", ["predicate", "input"])
def test_without_embedding_a_request_brings_what_decides(models: Models, tmp_path: Path, gating: str) -> None:
    report = export_triton(models.path[gating], tmp_path, "dit", embed_gates=False)
    server, policy = Server(report.path), models.learned() if gating == "predicate" else Scheduled(TABLE)
    wanted = expected(models, gating, policy)
    layout = OnnxRunner(models.path[gating]).layout
    for step, arguments in enumerate(trajectory(TOY, steps=STEPS)):
        brought: dict[str, Any] = {name: value.numpy() for name, value in arguments.items()}
        if isinstance(policy, Learned):
            row = layout.row(policy.table.row(float(arguments["t"].max())))
            brought |= {"gate_weight": row.weight.numpy(), "gate_bias": row.bias.numpy()}
        else:
            brought |= {f"should_compute_{gate}": TABLE.should_compute[step, gate] for gate in range(4)}
        brought["slope"] = np.ones(len(layout.gates))
        seen = torch.from_numpy(server.infer(1, step == 0, brought)["output_0"])
        assert (seen - wanted[step]).abs().max() < TOLERANCE, step


def test_the_configuration_says_what_the_model_has(models: Models, tmp_path: Path) -> None:
    report = export_triton(
        models.path["input"], tmp_path, "dit", policy=Scheduled(TABLE), sequences=5, idle_seconds=2.5
    )
    config = read_config(report.path)
    assert (config.name, config.backend, config.max_batch_size) == ("dit", "onnxruntime", 0)
    batching = config.sequence_batching
    assert batching.oldest.max_candidate_sequences == 5
    assert batching.max_sequence_idle_microseconds == 2_500_000
    assert not any(state.use_same_buffer_for_input_output for state in batching.state)
    graph = onnx.load(model_file(report.path)[1]).graph
    shapes = {item.name: [size.dim_value or -1 for size in item.type.tensor_type.shape.dim] for item in graph.input}
    states = {state.input_name: list(state.dims) for state in batching.state}
    own = {item.name: list(item.dims) for item in config.input}
    assert {**states, **own, "START": [1]} == shapes
    assert {state.output_name for state in batching.state} | {item.name for item in config.output} == {
        item.name for item in graph.output
    }
    metadata = OnnxRunner(models.path["input"]).metadata
    full = {slot.input: shape_at(slot.shape, metadata.example) for slot in metadata.slots}
    lengths = {state.input_name: np.prod(full.get(state.input_name, state.dims)) for state in batching.state}
    sizes = sum(lengths[state.input_name] * np.dtype(NUMPY[state.data_type]).itemsize for state in batching.state)
    assert report.cache_bytes == sizes
    onnx.checker.check_model(str(model_file(report.path)[1]), full_check=True)


def test_the_model_of_a_server_becomes_an_engine_with_real_branches(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for Triton's TensorRT backend, but by the builder that needs no GPU."""
    for gating, policy, jumps in (("predicate", models.learned("linear"), 2), ("input", Scheduled(TABLE), 4)):
        report = export_triton(
            models.path[gating], tmp_path, gating, policy=policy, backend="tensorrt", build=BuildConfig(flavor="rtx")
        )
        plan = model_file(report.path)[1]
        assert plan.is_file()
        assert plan.suffix == ".plan"
        assert read_config(report.path).platform == "tensorrt_plan"
        again = build_engine(report.path / "model.onnx", plan, BuildConfig(flavor="rtx"))
        assert again.skipped
        structure = again.structure
        assert (len(structure.branches), structure.problems) == (jumps, ())


def test_on_the_command_line(models: Models, tmp_path: Path) -> None:
    models.lazy.policy = Scheduled(TABLE)
    models.lazy.save(tmp_path / "gates")
    arguments = ["--gates", tmp_path / "gates", "--name", "tiny", "--output", tmp_path / "models"]
    values = answer("export-triton", models.path["input"], *arguments)
    assert (values["path"], values["embedded"]) == (str(tmp_path / "models" / "tiny"), True)
    assert values["inputs"] == ["x", "t", "y"]
    assert Server(tmp_path / "models" / "tiny").config.name == "tiny"
    assert "cannot be put into a model that was exported with gating='predicate'" in refusal(
        2, "export-triton", models.path["predicate"], *arguments
    )
    models.lazy.lazy_config = replace(models.lazy.lazy_config, max_reuse_age=2)
    models.lazy.save(tmp_path / "gates")
    assert "has warmup_steps or max_reuse_age, which no graph knows about" in refusal(
        2, "export-triton", models.path["input"], *arguments
    )
    assert answer("export-triton", models.path["input"], *arguments, "--no-embed-gates")["embedded"] is False


def test_what_cannot_be_served_is_refused(models: Models, tmp_path: Path) -> None:
    delayed = Learned(models.learned().table, delayed=True)
    with pytest.raises(ConfigError, match=r"Learned cannot be put into a model that was exported with gating='input'"):
        export_triton(models.path["input"], tmp_path, "dit", policy=delayed)
    several = Learned(GateTable.joined([models.learned().table] * 2))
    with pytest.raises(ConfigError, match="these gates are of several trajectories"):
        export_triton(models.path["predicate"], tmp_path, "dit", policy=several)
    with pytest.raises(ConfigError, match="backend is 'python'; expected one of 'onnxruntime', 'tensorrt'"):
        export_triton(models.path["input"], tmp_path, "dit", backend="python")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sequences is 0, idle_seconds is 60\.0; use 1 or more"):
        export_triton(models.path["input"], tmp_path, "dit", sequences=0)
    model = onnx.load(models.path["input"])
    (description,) = [entry for entry in model.metadata_props if entry.key == KEY]
    values = json.loads(description.value)
    values |= {"gating": "schedule", "should_compute": [True] * len(values["branches"])}
    description.value = json.dumps(values)
    onnx.save(model, tmp_path / "fixed.onnx")
    message = "gating='schedule' makes several; export with gating='input'"
    with verification(False), pytest.raises(ConfigError, match=message):
        export_triton(tmp_path / "fixed.onnx", tmp_path, "dit")
    with pytest.raises(ArtifactError, match=r"cannot read .*none\.onnx"):
        export_triton(tmp_path / "none.onnx", tmp_path, "dit")
    assert triton.TYPES["FLOAT16"] == "TYPE_FP16"
