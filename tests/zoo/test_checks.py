"""The checks of the zoo can fail: each is seen failing on a fault that it is there to find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.runtime import cache, known_step
from support.layers import MLP, Attention, norm
from support.small_model import SMALL, Small
from support.toy_models import call, randomize
from zoo import checks
from zoo.graph_oracle import GraphOracle
from zoo.subject import Subject


def asked(model: nn.Module) -> Subject:
    return Subject("small", randomize(model).eval(), call(SMALL), "x")


@pytest.fixture(scope="module")
def small() -> Subject:
    return asked(Small())


CHECKS = ("attention", "share", "exact", "schedule", "gradients", "batch")


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_model_passes(small: Subject, check: str) -> None:
    assert checks.CHECKS[check](small)


def test_a_result_that_differs_in_the_last_bit_is_not_exact(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = LazyBranch.compute
    monkeypatch.setattr(LazyBranch, "compute", lambda *given: tuple(item * (1 + 1e-6) for item in sound(*given)))
    with pytest.raises(AssertionError, match="differs by"):
        checks.exact(small)


def test_reuse_without_extrapolation_is_not_the_schedule(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cache, known_step):
        monkeypatch.setattr(module, "along", lambda value, *rest: value)
    with pytest.raises(AssertionError, match="from the oracle"):
        checks.schedule(small)


def test_rows_that_change_places_are_not_their_single_calls(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = LazyBranch.compute

    def swapped(self: LazyBranch, inputs: Any) -> tuple[Tensor, ...]:
        return tuple(item.flip(0) for item in sound(self, inputs))

    monkeypatch.setattr(LazyBranch, "compute", swapped)
    with pytest.raises(AssertionError, match="rows differ"):
        checks.batch(small)


class MixesRows(Small):
    """Every row starts from the mean of all."""

    def enter(self, x: Tensor, t: Tensor) -> Tensor:
        return super().enter(x + x.mean(dim=0, keepdim=True), t)


def test_a_model_that_mixes_rows_has_branches_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = asked(MixesRows())
    assert checks.batch(model) == "2 of 2, branches alone"
    sound = LazyBranch.compute

    def mixed(self: LazyBranch, inputs: Any) -> tuple[Tensor, ...]:
        return tuple(item + item.mean(dim=0) for item in sound(self, inputs))

    monkeypatch.setattr(LazyBranch, "compute", mixed)
    with pytest.raises(AssertionError, match="a row of attn alone differs"):
        checks.batch(model)


class LinearAttention(Small):
    """``q (kᵀ v)``, without a softmax, outside of any residual branch."""

    def blocks(self, h: Tensor) -> Tensor:
        h = norm(h) @ (norm(h).transpose(1, 2) @ h)
        return h + self.mlp(norm(h))


def test_linear_attention_is_attention() -> None:
    with pytest.raises(AssertionError, match="outside of branches"):
        checks.attention(asked(LinearAttention()))


class Silent(Small):
    """Its MLP has no say in the result."""

    def blocks(self, h: Tensor) -> Tensor:
        return h + self.attn(norm(h)) + 0.0 * self.mlp(norm(h))


def test_a_branch_without_a_say_needs_no_gradient_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.gradients(asked(Silent())) == "1 of 2 gates"
    assert [checks._has_a_say(asked(Silent()), name) for name in ("attn", "mlp")] == [True, False]
    monkeypatch.setattr(checks, "_has_a_say", lambda *args: True)
    with pytest.raises(AssertionError, match="no gradient at mlp"):
        checks.gradients(asked(Silent()))


class Replaces(Small):
    """An attention that nothing is added to, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def blocks(self, h: Tensor) -> Tensor:
        h = self.attn(norm(h))
        return h + self.mlp(norm(h))


def test_an_attention_outside_of_branches_must_be_listed() -> None:
    with pytest.raises(AssertionError, match="outside of branches"):
        checks.attention(asked(Replaces()))


def test_the_oracle_knows_a_value_that_is_computed_twice() -> None:
    class Twice(Small):
        def blocks(self, h: Tensor) -> Tensor:
            return h + self.mlp(norm(h)) + self.mlp(norm(h))

    model = asked(Twice())
    assert len(model.lazy.branches) == 1
    assert checks.schedule(model)


def test_the_oracle_needs_the_outputs_that_it_cuts_at(small: Subject) -> None:
    program = small.lazy.graph.captured.program
    branch = small.lazy.branches[0]
    oracle = GraphOracle(small.model, program, [branch], np.ones((1, 1), dtype=bool), "last")
    assert len(oracle([*small.arguments.values()])) == 1
    renamed = replace(branch, outputs=(replace(branch.outputs[0], name="nowhere"),))
    with pytest.raises(AssertionError, match="has no nowhere"):
        GraphOracle(small.model, program, [renamed], np.ones((1, 1), dtype=bool), "last")
