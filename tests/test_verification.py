"""`compare` passes a sound model, and each of its checks fails on the fault it is there for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, GateTable, LazyConfig, LazyModule, Learned, Scheduled
from lazy_compile.errors import VerificationError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.verification import Comparison, compare
from support.factories import euler, tiny_dit, tiny_inputs


@pytest.fixture(scope="module")
def captured() -> LazyModule:
    return lazy_compile.transform(*tiny_dit())


@pytest.fixture
def lazy(captured: LazyModule) -> LazyModule:
    captured.policy, captured.lazy_config = AlwaysCompute(), LazyConfig()
    return captured


def failed(comparison: Comparison) -> list[str]:
    return [check.name for check in comparison.checks if not check.passed]


@pytest.mark.parametrize(
    "options", [{}, {"reuse": "last", "max_reuse_age": 2, "warmup_steps": 2}], ids=["linear", "last, limited"]
)
def test_a_sound_model_passes_every_check(lazy: LazyModule, options: dict[str, Any]) -> None:
    lazy.lazy_config = LazyConfig(**options)
    comparison = compare(lazy, euler(8))
    assert [check.name for check in comparison.checks] == [
        "always compute",
        "schedule: decisions",
        "schedule: outputs",
    ]
    assert comparison.passed
    comparison.require()


def test_policy_is_run_and_is_the_same_afterwards(lazy: LazyModule) -> None:
    policy = Scheduled(CacheSchedule.every(2, 5, len(lazy.branches)))
    lazy.policy = policy
    comparison = compare(lazy, euler(5))
    assert lazy.policy is policy
    assert lazy.lazy_config == LazyConfig()
    check = comparison.checks[-1]
    assert (check.name, check.passed, check.seen) == ("policy Scheduled", True, "finite, reuse 40.0%")


def test_samples_that_are_not_finite_are_seen(lazy: LazyModule) -> None:
    lazy.policy = Learned(GateTable.constant(lazy.branches, torch.tensor([1000.0, 0.0]), bias=-1.0))

    def overflowing(denoiser: Callable[..., Any], seed: int) -> Tensor:
        samples = euler(4)(denoiser, seed)
        return samples / 0 if isinstance(getattr(denoiser, "policy", None), Learned) else samples

    comparison = compare(lazy, overflowing)
    assert failed(comparison) == ["policy Learned"]


def test_a_branch_that_computes_something_else_is_seen(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = LazyBranch.compute

    def wrong(self: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return tuple(output * (1 + 1e-6) for output in compute(self, inputs))

    monkeypatch.setattr(LazyBranch, "compute", wrong)
    assert failed(compare(lazy, euler(4))) == ["always compute"]


def test_a_wrong_extrapolation_is_seen(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazy_compile.runtime.cache.extrapolate", lambda value, previous, factors, axis: value)
    assert failed(compare(lazy, euler(8))) == ["schedule: outputs"]


def test_a_runtime_that_ignores_the_schedule_is_seen(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = PolicyStep._decide

    def always(self: PolicyStep, branch: LazyBranch, inputs: Sequence[Any], slot: Any) -> Any:
        return decide(self, branch, inputs, None)

    monkeypatch.setattr(PolicyStep, "_decide", always)
    assert failed(compare(lazy, euler(8))) == ["schedule: decisions", "schedule: outputs"]


def test_outputs_that_are_not_a_number_never_pass(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lazy_compile.runtime.cache.extrapolate",
        lambda value, previous, factors, axis: torch.full_like(value, torch.nan),
    )
    assert "schedule: outputs" in failed(compare(lazy, euler(8)))


def test_failure_is_one_error_with_the_first_reason(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazy_compile.runtime.cache.extrapolate", lambda value, previous, factors, axis: value)
    with pytest.raises(
        VerificationError,
        match=r"1 of 3 checks failed; schedule: outputs: seen relative difference .* expected at most",
    ):
        compare(lazy, euler(8)).require()


def test_separate_calls_for_two_streams_are_followed(lazy: LazyModule) -> None:
    def guided(denoiser: Callable[..., Any], seed: int) -> Tensor:
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        for time in (900, 700, 500, 300, 100):
            t = torch.full((2,), time)
            x = x - 0.1 * (2 * denoiser(x, t) - denoiser(0.5 * x, t))
        return x

    lazy.policy = AlwaysCompute()
    comparison = compare(lazy, guided)
    assert comparison.passed


@pytest.fixture(scope="module")
def exported(captured: LazyModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    captured.policy, captured.lazy_config = AlwaysCompute(), LazyConfig()
    path = tmp_path_factory.mktemp("verify") / "tiny.onnx"
    lazy_compile.export_onnx(captured, path, tiny_inputs())
    return path


def test_exported_model_follows_schedule_and_gates(lazy: LazyModule, exported: Path) -> None:
    table = GateTable.constant(lazy.branches, torch.tensor([1000.0, 500.0, 0.0]))
    lazy.policy = Learned(replace(table, bias=torch.tensor([[1.0] * 4, [-1.0] * 4, [-1.0, 1.0, -1.0, 1.0]])))
    comparison = compare(lazy, euler(8), onnx=exported)
    names = [check.name for check in comparison.checks]
    assert names[-3:] == ["ONNX: structure", "ONNX Runtime: Scheduled", "ONNX Runtime: Learned"]
    assert comparison.passed
    assert lazy.lazy_config == LazyConfig()


def test_exported_weights_that_differ_are_seen(exported: Path) -> None:
    other = lazy_compile.transform(*tiny_dit())
    with torch.no_grad():
        other.original.final.weight.mul_(1.01)
    assert failed(compare(other, euler(8), onnx=exported)) == ["ONNX Runtime: Scheduled"]
