"""The runner of engines, with ONNX Runtime in the place of a GPU: see ``fake_tensorrt`` for what that shows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, Learned, Policy, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.runner import Runner
from lazy_compile.backends.tensorrt import device as tensorrt_device
from lazy_compile.backends.tensorrt import runner as tensorrt_runner
from lazy_compile.backends.tensorrt.build import build_engine, build_engines
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.runner import TensorRTRunner
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.errors import ArtifactError, BackendError
from support.conditional_models import one_if, written
from support.fake_tensorrt import FakeTensorRT, HostDevice
from support.lowering import knots, random_gates
from support.toy_models import TOYS, call, trajectory

STEPS, TOLERANCE = 8, 1e-4
TABLE = CacheSchedule.every(2, STEPS, 2)
RTX = BuildConfig(flavor="rtx")
TOY = TOYS["windowed"]


class Engines:
    """Engines of one toy in each gating, the ONNX files that they were built from, and the fake that runs them."""

    def __init__(self, folder: Path) -> None:
        self.lazy = lazy_compile.transform(TOY.model(), call(TOY), batch_rule="all_reuse")
        self.engine, self.onnx, made = {}, {}, {}
        for gating in ("predicate", "input", "schedule"):
            self.lazy.policy = Scheduled(TABLE) if gating == "schedule" else AlwaysCompute()
            onnx, engine = folder / f"{gating}.onnx", folder / f"{gating}.engine"
            export_onnx(
                self.lazy, onnx, gating=gating, dynamic=False, **({"predictors": True} if gating == "input" else {})
            )
            if gating == "schedule":
                build_engines(onnx, engine, RTX)
                made.update(
                    zip(
                        ScheduleVariants.load(engine).files.values(),
                        ScheduleVariants.load(onnx).files.values(),
                        strict=True,
                    )
                )
            else:
                build_engine(onnx, engine, RTX, policy=Scheduled(TABLE))
                made[engine] = onnx
            self.engine[gating], self.onnx[gating] = engine, onnx
        sidecars = {path: EngineSidecar.load(path) for path in made}
        self.version = sidecars[self.engine["input"]].version
        self.built_from = {sidecars[path].content: onnx for path, onnx in made.items()}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def fake(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    sizes = OnnxRunner(engines.onnx["input"]).metadata.example
    trt, device = FakeTensorRT(engines.version, engines.built_from, sizes), HostDevice()
    monkeypatch.setattr(tensorrt_runner, "load", lambda flavor: trt)
    monkeypatch.setattr(tensorrt_runner, "open_device", lambda: device)
    return trt


def samples(runner: Runner, policy: Policy | None) -> list[Tensor]:
    denoiser = EngineDenoiser(runner, policy)
    return [torch.as_tensor(denoiser(**arguments)) for arguments in trajectory(TOY, steps=STEPS)]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def learned(engines: Engines, delayed: bool = False) -> Learned:
    return Learned(random_gates(engines.lazy, knots(STEPS)), delayed=delayed)


@pytest.mark.parametrize(
    ("gating", "policy"),
    [
        ("predicate", lambda engines: learned(engines)),
        ("predicate", lambda engines: Scheduled(TABLE)),
        ("input", lambda engines: learned(engines, delayed=True)),
        ("input", lambda engines: Scheduled(TABLE)),
        ("schedule", lambda engines: Scheduled(TABLE)),
    ],
)
def test_an_engine_follows_pytorch_and_onnx_runtime(
    engines: Engines, fake: FakeTensorRT, gating: str, policy: Callable[[Engines], Policy]
) -> None:
    rule = policy(engines)
    runner = TensorRTRunner(engines.engine[gating])
    seen = samples(runner, rule)
    assert largest_difference(seen, samples(OnnxRunner(engines.onnx[gating], threads=1), rule)) == 0.0
    engines.lazy.policy = rule
    with torch.no_grad():
        expected = [engines.lazy(**arguments) for arguments in trajectory(TOY, steps=STEPS)]
    assert largest_difference(seen, expected) < TOLERANCE
    assert 0 < engines.lazy.stats.lazy_ratio < 1
    assert runner.decisions.shape == (2,)


def test_an_engine_carries_its_policy(engines: Engines, fake: FakeTensorRT) -> None:
    for gating in ("input", "schedule"):
        runner = TensorRTRunner(engines.engine[gating])
        denoiser = EngineDenoiser(runner)
        assert denoiser.policy == Scheduled(TABLE)
        assert largest_difference(samples(runner, None), samples(runner, Scheduled(TABLE))) == 0.0


# Queues, contexts, graphs -------------------------------------------------------------------------------------------


def test_streams_have_contexts_of_their_own_and_do_not_mix(engines: Engines, fake: FakeTensorRT) -> None:
    runner = TensorRTRunner(engines.engine["predicate"])
    alone = [samples(runner, Scheduled(TABLE)) for _ in range(2)]
    assert largest_difference(*alone) == 0.0
    arguments = trajectory(TOY, steps=STEPS)
    streams = [runner.new_stream() for _ in range(2)]
    results: list[list[Tensor]] = [[], []]
    for step, masks in enumerate(TABLE.should_compute):
        for position, stream in enumerate(streams):
            late = step - 2 * position  # the second starts two steps later
            if late >= 0:
                row = TABLE.should_compute[late].tolist() if position else masks.tolist()
                results[position].append(runner.run(arguments[late], force=row, stream=stream)[0])
    assert largest_difference(results[0], alone[0]) == 0.0
    assert largest_difference(results[1], alone[0][: len(results[1])]) == 0.0
    assert len(fake.contexts) == 4
    assert len({context.addresses["cache_0_0"] for context in fake.contexts}) > 1


def test_threads_share_an_engine(engines: Engines, fake: FakeTensorRT) -> None:
    denoiser = EngineDenoiser(TensorRTRunner(engines.engine["input"]), Scheduled(TABLE))
    alone = EngineDenoiser(TensorRTRunner(engines.engine["input"]), Scheduled(TABLE))
    requests = [trajectory(TOY, steps=STEPS, seed=seed) for seed in range(2)]
    expected = [[alone(**arguments) for arguments in request] for request in requests]
    seen: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        seen[number] = [denoiser(**arguments) for arguments in requests[number]]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(largest_difference(seen[number], expected[number]) == 0.0 for number in range(2))


def test_fixed_decisions_are_replayed_as_graphs(engines: Engines, fake: FakeTensorRT) -> None:
    plain = samples(TensorRTRunner(engines.engine["schedule"], cuda_graphs=False), Scheduled(TABLE))
    assert sum(context.replayed for context in fake.contexts) == 0
    fake.contexts.clear()
    runner = TensorRTRunner(engines.engine["schedule"])
    policy = Scheduled(TABLE)
    assert largest_difference(samples(runner, policy), plain) == 0.0
    # One context for each mask, and two pairs of buffers; of each pair the first step is not replayed.
    assert len(fake.contexts) == 2
    enqueued, replayed = (sum(getattr(item, name) for item in fake.contexts) for name in ("enqueued", "replayed"))
    assert enqueued + replayed == STEPS
    assert enqueued <= 4 <= replayed


def test_results_of_a_graph_are_the_callers(engines: Engines, fake: FakeTensorRT) -> None:
    runner = TensorRTRunner(engines.engine["schedule"])
    arguments = call(TOY)
    results = [runner.run(arguments, force="compute")[0] for _ in range(5)]
    before = [result.clone() for result in results]
    runner.run({**arguments, "x": arguments["x"] + 1}, force="compute")
    assert all(map(torch.equal, results, before))
    assert len({result.data_ptr() for result in results}) == 5


def test_what_cannot_be_captured_is_not(engines: Engines, fake: FakeTensorRT) -> None:
    fake.capturable = False
    expected = samples(OnnxRunner(engines.onnx["schedule"], threads=1), Scheduled(TABLE))
    assert largest_difference(samples(TensorRTRunner(engines.engine["schedule"]), None), expected) == 0.0
    assert sum(context.replayed for context in fake.contexts) == 0


def test_a_capture_that_fails_is_told_once_and_done_without(
    engines: Engines, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    fake.refuses = "capture"
    expected = samples(OnnxRunner(engines.onnx["schedule"], threads=1), Scheduled(TABLE))
    assert largest_difference(samples(TensorRTRunner(engines.engine["schedule"]), None), expected) == 0.0
    assert sum(context.replayed for context in fake.contexts) == 0
    assert [record.message.count("runs without CUDA graphs") for record in caplog.records] == [1, 1], "for each mask"
    assert "not permitted when stream is capturing" in caplog.text


def test_an_engine_that_cannot_be_asked_is_captured_if_it_has_no_jump(
    engines: Engines, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("support.fake_tensorrt.FakeContext.is_stream_capturable")
    samples(TensorRTRunner(engines.engine["input"]), None)
    assert sum(context.replayed for context in fake.contexts) == 0
    samples(TensorRTRunner(engines.engine["schedule"]), None)
    assert sum(context.replayed for context in fake.contexts) > 0


@pytest.mark.parametrize("on_host", [False, True])
def test_decisions_go_through_pinned_memory(engines: Engines, fake: FakeTensorRT, on_host: bool) -> None:
    fake.capturable = False
    fake.host_inputs = frozenset({"should_compute_0", "should_compute_1"} if on_host else ())
    runner = TensorRTRunner(engines.engine["input"])
    expected = samples(OnnxRunner(engines.onnx["input"], threads=1), Scheduled(TABLE))
    assert largest_difference(samples(runner, Scheduled(TABLE)), expected) == 0.0
    (context,) = fake.contexts
    first, second = (context.addresses[f"should_compute_{index}"] for index in range(2))
    assert abs(first - second) == tensorrt_device.ALIGNMENT
    queue = runner.sessions[()].place.queues[0]  # type: ignore[attr-defined]
    assert queue.waits == STEPS - 2, "only a block that is still being read is waited for"


# Refusals -----------------------------------------------------------------------------------------------------------


def copied(engine: Path, folder: Path, **changes: Any) -> Path:
    """An engine elsewhere, with another description."""
    target = folder / "m.engine"
    target.write_bytes(engine.read_bytes())
    replace(EngineSidecar.load(engine), **changes).save(target)
    return target


def test_an_engine_without_its_description_is_refused(engines: Engines, fake: FakeTensorRT, tmp_path: Path) -> None:
    target = copied(engines.engine["input"], tmp_path)
    TensorRTRunner(target)
    target.write_bytes(target.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match=r"is not the engine that m.engine.json describes"):
        TensorRTRunner(target)
    (tmp_path / "m.engine.json").unlink()
    with pytest.raises(ArtifactError, match=r"m\.engine has no m\.engine\.json beside it; copy both"):
        TensorRTRunner(target)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": "0.9"}, BackendError, r"was built with TensorRT-RTX 0\.9, and runs with no other; this is 1\."),
        ({"device": "H100"}, BackendError, "was built on and for H100; this is Abacus 9000: build it again here"),
        ({"model": None}, ArtifactError, "was built from ONNX that export_onnx did not write"),
        ({"tensors": ()}, ArtifactError, "and its description disagree about 'age'; build the engine again"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    engines: Engines, fake: FakeTensorRT, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TensorRTRunner(copied(engines.engine["input"], tmp_path, **changes))


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("engine", r"cannot load .*m.engine: IRuntime::deserializeCudaEngine: the plan is of another platform; build"),
        ("context", r"cannot prepare .*\(Requested amount of GPU memory .*\); free memory on the GPU, or run fewer"),
        ("address", "does not take '.*' while it ran .*: there is no tensor"),
        ("step", r"TensorRT-RTX .* failed while it ran .*m.engine: Cuda Runtime \(out of memory\)"),
    ],
)
def test_what_tensorrt_refuses_is_one_line(
    engines: Engines, fake: FakeTensorRT, tmp_path: Path, refuses: str, message: str
) -> None:
    fake.refuses = refuses
    with pytest.raises(BackendError, match=message) as caught:
        TensorRTRunner(copied(engines.engine["input"], tmp_path)).run(call(TOY), force="compute")
    assert "\n" not in str(caught.value)


def test_without_a_gpu_it_says_so(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="an engine runs on a GPU, and PyTorch sees none here"):
        TensorRTRunner(engines.engine["input"])


def test_other_onnx_makes_no_engine_to_run(fake: FakeTensorRT, tmp_path: Path) -> None:
    build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", RTX)
    with pytest.raises(ArtifactError, match="nothing is known about its caches"):
        TensorRTRunner(tmp_path / "m.engine")


def test_the_fake_sees_a_cache_that_is_read_and_written_at_once(engines: Engines, fake: FakeTensorRT) -> None:
    runner = TensorRTRunner(engines.engine["input"], cuda_graphs=False)
    runner.run(call(TOY), force="compute")
    for pair in runner._stream.buffers.values():
        pair[1] = pair[0]
    with pytest.raises(AssertionError, match="lies on"):
        runner.run(call(TOY), force="compute")


def test_the_fake_sees_work_outside_the_callers_order(engines: Engines, fake: FakeTensorRT) -> None:
    runner = TensorRTRunner(engines.engine["input"], cuda_graphs=False)
    runner.run(call(TOY), force="compute")
    (context,) = fake.contexts
    with pytest.raises(AssertionError, match="outside the caller's order"):
        context.execute_async_v3(runner.sessions[()].place.queues[0].handle)  # type: ignore[attr-defined]
