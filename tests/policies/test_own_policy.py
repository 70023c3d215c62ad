"""A policy of one's own is saved, loaded, exported and built like any other, with no edit elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import BuildConfig, Policy, build_engine, export_onnx
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.policies.policy import GateQuery
from lazy_compile.policies.serialize import from_json, to_json
from lazy_compile.runtime.artifact import MANIFEST
from support.branches import branch
from support.small_model import SMALL, fresh, reused, run
from support.toy_models import call, trajectory

STEPS = 6


@dataclass(frozen=True)
class TakingTurns(Policy):
    """The branches compute one after the other, one at each step."""

    branches: int
    warmup: int = 2

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> list[bool]:
        return [step < self.warmup or step % self.branches == index for index in range(self.branches)]


class EverySecondByMemory(Policy):
    """It accumulates, and has no fields."""

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> bool:
        memory["asked"] = int(memory.get("asked", 0)) + 1  # type: ignore[call-overload]
        return int(memory["asked"]) % 2 == 1  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class ByATensor(Policy):
    until: Tensor

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> bool:
        return step < int(self.until)


TURNS = [[0, 0], [0, 0], [0, 1], [1, 0], [0, 1], [1, 0]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lazy = fresh(policy=TakingTurns(2))
    path = tmp_path_factory.mktemp("own") / "m.onnx"
    export_onnx(lazy, path, gating="input", dynamic=False)
    return path


@pytest.fixture
def undefined() -> Iterator[str]:
    """The kind of a policy whose module was not imported here."""
    kind = TakingTurns.kind
    del Policy.kinds[kind]
    yield kind
    Policy.kinds[kind] = TakingTurns


def test_it_decides_in_pytorch() -> None:
    lazy = fresh(policy=TakingTurns(2))
    run(lazy, trajectory(SMALL, steps=STEPS))
    assert reused(lazy) == TURNS


def test_decisions_are_asked_once_a_step() -> None:
    lazy = fresh(policy=EverySecondByMemory())
    run(lazy, trajectory(SMALL, steps=4))
    assert reused(lazy) == [[0, 0], [1, 1], [0, 0], [1, 1]]


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    fresh(policy=TakingTurns(2, warmup=1)).save(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["policy"] == {
        "kind": f"{__name__}:TakingTurns",
        "branches": 2,
        "warmup": 1,
    }
    assert lazy_compile.load(tmp_path, SMALL.model(), call(SMALL)).policy == TakingTurns(2, warmup=1)


def test_tensors_of_its_fields_are_saved_too(tmp_path: Path) -> None:
    fresh(policy=ByATensor(torch.tensor(3))).save(tmp_path)
    policy = lazy_compile.load(tmp_path, SMALL.model()).policy
    assert isinstance(policy, ByATensor)
    assert int(policy.until) == 3


def test_it_travels_with_the_onnx_file(exported: Path) -> None:
    denoiser = EngineDenoiser(OnnxRunner(exported, threads=1))
    assert denoiser.policy == TakingTurns(2)
    for arguments in trajectory(SMALL, steps=STEPS):
        denoiser(**arguments)
    assert denoiser.stats.reuse_table.tolist() == TURNS


def test_it_travels_with_an_engine(exported: Path, tmp_path: Path) -> None:
    build_engine(exported, tmp_path / "m.engine", BuildConfig(flavor="rtx", compute_capabilities=("8.9",)))
    assert EngineSidecar.load(tmp_path / "m.engine").policy == TakingTurns(2)


def test_one_that_is_not_defined_here_is_refused_unless_another_is_given(exported: Path, undefined: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        EngineDenoiser(OnnxRunner(exported, threads=1))
    assert str(caught.value) == (
        f"the exported Small names the policy '{undefined}'; expected one of always_compute, scheduled, learned, "
        f"every_nth, or one of your own: import {__name__} before, since a file imports nothing by itself"
    )
    EngineDenoiser(OnnxRunner(exported, threads=1), "fast")


def test_a_file_imports_nothing() -> None:
    sys.modules.pop("this", None)
    with pytest.raises(ArtifactError, match="import this before"):
        from_json({"kind": "this:s"}, "the file")
    assert "this" not in sys.modules


def test_a_kind_of_ones_own_choice_names_it() -> None:
    class Named(Policy, kind="mine"):
        def should_compute(self, query: GateQuery) -> bool:
            return True

    assert to_json(Named()) == {"kind": "mine"}
    assert isinstance(from_json({"kind": "mine"}, "the file"), Named)
    del Policy.kinds["mine"]


@dataclass(frozen=True)
class Holds(Policy):
    value: Any

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> bool:
        return True


def test_what_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'value' of a policy of class Holds cannot be written as JSON \("):
        to_json(Holds(object()))


def test_one_that_decides_nothing_is_refused_when_it_is_asked() -> None:
    class Silent(Policy):
        pass

    with pytest.raises(ConfigError, match=r"Silent decides nothing; define should_compute\(\) or decisions\(\) in it"):
        Silent().should_compute(GateQuery(branch(0), [torch.ones(1, 1, 2)], 0, 0.0, None, {}))
