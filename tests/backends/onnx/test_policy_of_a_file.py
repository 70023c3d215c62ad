"""An ONNX file carries the policy that it was exported with, and is followed without being told again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lazy_compile import (
    AlwaysCompute,
    BuildConfig,
    CacheSchedule,
    GateTable,
    LazyModule,
    Learned,
    Policy,
    Scheduled,
    build_engine,
    export_onnx,
)
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx import metadata
from lazy_compile.backends.onnx.metadata import KEY, Gating
from lazy_compile.backends.onnx.sealed_file import DIGEST_KEY
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.policies.presets import PRESETS, EveryNth
from lazy_compile.policies.serialize import to_json
from support.small_model import SMALL, fresh, reused, run
from support.toy_models import trajectory

STEPS = 6
TABLE = CacheSchedule.random(0.5, STEPS, 2, seed=3)
SLOPED = Scheduled(CacheSchedule(TABLE.should_compute, np.linspace(0.2, 1.0, STEPS * 2).reshape(STEPS, 2)))


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return fresh()


def gates(lazy: LazyModule) -> GateTable:
    table = GateTable.constant(lazy.branches, torch.linspace(1000.0, 0.0, STEPS))
    generator = torch.Generator().manual_seed(0)
    return GateTable(
        table.features,
        table.knots,
        torch.randn(table.weight.shape, generator=generator),
        torch.randn(table.bias.shape, generator=generator),
        "linear",
        torch.rand(table.bias.shape, generator=generator),
    )


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("gating", "policy_of"),
    [
        ("input", lambda lazy: SLOPED),
        slow("predicate", lambda lazy: SLOPED),
        ("schedule", lambda lazy: SLOPED),
        ("predicate", lambda lazy: Learned(gates(lazy), shift=0.3)),
        ("input", lambda lazy: Learned(gates(lazy), shift=0.3, delayed=True)),
        slow("schedule", lambda lazy: EveryNth(2, 3)),
        ("input", lambda lazy: EveryNth(2, 3)),
    ],
    ids=["schedule", "schedule in a row", "fixed", "gates", "delayed gates", "preset, fixed", "preset"],
)
def test_a_file_is_followed_without_being_told_again(
    lazy: LazyModule, tmp_path: Path, gating: Gating, policy_of: Callable[[LazyModule], Policy]
) -> None:
    lazy.policy = policy_of(lazy)
    export_onnx(lazy, tmp_path / "m", gating=gating, dynamic=False)
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "m", threads=1))
    assert to_json(denoiser.policy) == to_json(lazy.policy)
    lazy.reset()
    lazy.reset_stats()
    expected = run(lazy, trajectory(SMALL, steps=STEPS + 2))
    seen = [denoiser(**arguments) for arguments in trajectory(SMALL, steps=STEPS + 2)]
    if not lazy.policy.reads_gates:  # rows of a batch decide each by themselves in PyTorch
        assert denoiser.stats.reuse_table.tolist() == reused(lazy)
        assert max(float((a - b).abs().max()) for a, b in zip(seen, expected, strict=True)) < 1e-4
    assert 0 < denoiser.stats.lazy_ratio < 1


@pytest.fixture(scope="module")
def scheduled(lazy: LazyModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lazy.policy = SLOPED
    path = tmp_path_factory.mktemp("scheduled") / "m.onnx"
    export_onnx(lazy, path, gating="input", dynamic=False)
    return path


def test_a_policy_that_is_given_comes_first(scheduled: Path) -> None:
    assert EngineDenoiser(OnnxRunner(scheduled, threads=1), "fast").policy == PRESETS["fast"]
    assert EngineDenoiser(OnnxRunner(scheduled, threads=1), TABLE).policy == Scheduled(TABLE)
    assert EngineDenoiser(OnnxRunner(scheduled, threads=1), AlwaysCompute()).policy == AlwaysCompute()


def test_it_says_what_it_follows(scheduled: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lazy_compile"):
        EngineDenoiser(OnnxRunner(scheduled, threads=1))
    assert caplog.messages == ["exported Small: a schedule of 6 steps that reuses 50% of the branches"]


def test_an_engine_follows_the_file_that_it_was_built_from(scheduled: Path, tmp_path: Path) -> None:
    config = BuildConfig(flavor="rtx", compute_capabilities=("8.9",))
    report = build_engine(scheduled, tmp_path / "m.engine", config)
    assert report.policy == SLOPED.describe()
    sidecar = EngineSidecar.load(tmp_path / "m.engine")
    assert sidecar.policy == SLOPED
    assert sidecar.model is not None
    assert sidecar.model.policy is None, "it stands once in the description"
    build_engine(scheduled, tmp_path / "m.engine", config, policy=EveryNth(1, 2))
    assert EngineSidecar.load(tmp_path / "m.engine").policy == EveryNth(1, 2)


def test_a_file_of_the_last_release_runs_dense_and_says_so(
    scheduled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = onnx.load(scheduled)
    (entry,) = [item for item in model.metadata_props if item.key == KEY]
    values = {name: value for name, value in json.loads(entry.value).items() if name != "policy"}
    entry.value = json.dumps({**values, "version": 4})
    (digest,) = [item for item in model.metadata_props if item.key == DIGEST_KEY]
    model.metadata_props.remove(digest)
    onnx.save(model, tmp_path / "old.onnx")
    assert EngineDenoiser(OnnxRunner(tmp_path / "old.onnx", threads=1)).policy == AlwaysCompute()
    assert caplog.messages == [
        "the exported Small carries no policy, as files of earlier releases do not: every branch computes; give one, "
        "or export it again"
    ]


def test_what_the_file_cannot_follow_is_left_out_with_a_warning(
    lazy: LazyModule, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy.policy = Learned(gates(lazy))
    export_onnx(lazy, tmp_path / "m.onnx", gating="input", predictors=False, dynamic=False)
    assert "the exported Small carries no policy; give its runner one: Learned(..., delayed=False) cannot steer" in (
        caplog.text
    )
    assert OnnxRunner(tmp_path / "m.onnx", threads=1).policy is None
    monkeypatch.setattr(metadata, "MAX_POLICY_BYTES", 1000)
    export_onnx(lazy, tmp_path / "m.onnx", dynamic=False)
    assert "it takes 0 MiB, a file carries 0 at most" in caplog.text
