"""``torch.compile`` around a lazy model, and of its branches alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import lazy_compile
from lazy_compile import CacheSchedule, Policy, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.runtime.known_step import KnownStep
from support.layers import MLP
from support.slow import slow_but
from support.small_model import SMALL, Decides, fresh, reused, run, same
from support.toy_models import TOYS, call, trajectory

STEPS = 20
DIT = TOYS["dit"]
HALVES = Decides(lambda step, branch: [step % 2 == 0, step % 3 == 0])
"""Two rows that do otherwise."""


@pytest.fixture(autouse=True)
def without_leftovers() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


PIECES = 3
"""Of a step of the small model that is known when it begins: one ends at each of two branches, one at the output."""

TABLE = np.array([[1, 1], [1, 1], [0, 1], [0, 0], [1, 0], [0, 0]], dtype=bool)
SLOPES = np.array([[1, 1], [1, 1], [0.5, 1], [0.0, 2.0], [1, 0.7], [1.5, 1]])


def test_a_compiled_lazy_model_compiles_its_pieces_once_for_all_steps() -> None:
    lazy = fresh()
    lazy.policy = Scheduled(CacheSchedule.every(2, steps=STEPS, branches=2))
    calls = trajectory(SMALL, steps=STEPS)
    expected = run(lazy, calls)
    compiled = torch.compile(lazy, backend="eager")
    lazy.reset()
    run(compiled, calls[:4])  # computes, repeats one value, computes, follows a line through two
    frames = counters["stats"]["unique_graphs"], counters["frames"]["total"]
    lazy.reset()
    assert same(run(compiled, calls), expected)
    assert (counters["stats"]["unique_graphs"], counters["frames"]["total"]) == frames
    assert frames[0] == lazy.compilations


def test_torch_compile_hands_its_backend_to_the_pieces() -> None:
    lazy, seen = fresh(), []

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph_module)
        return graph_module.forward

    run(torch.compile(lazy, backend=backend), trajectory(SMALL, steps=2))
    assert len(seen) == PIECES
    targets = {node.target for graph_module in seen for node in graph_module.graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default in targets


@pytest.mark.parametrize("policy", [Scheduled(CacheSchedule.every(2, STEPS, 2)), HALVES], ids=["scheduled", "by rows"])
def test_compiled_pieces_decide_and_reuse_as_in_eager_mode(policy: Policy) -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=STEPS)
    lazy.policy = policy
    expected, table = run(lazy, calls), reused(lazy)
    lazy.compile(backend="eager")
    lazy.reset()
    lazy.reset_stats()
    assert same(run(lazy, calls), expected)
    assert reused(lazy) == table
    assert lazy.stats.captures == 1


ARMS = [{}, {"reuse": "last"}, {"reuse": "taylor"}, {"granularity": "block"}]


@pytest.mark.parametrize("options", slow_but(ARMS[1:], ARMS), ids=str)
def test_every_reuse_arm_is_compiled(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, calls = fresh(**options), trajectory(SMALL, steps=len(TABLE))
    branches = len(lazy.branches)
    lazy.policy = Scheduled(CacheSchedule(TABLE[:, :branches], SLOPES[:, :branches]))
    expected, table = run(lazy, calls), reused(lazy)
    lazy.compile(backend="eager")
    lazy.reset()
    lazy.reset_stats()
    monkeypatch.setattr(KnownStep, "evaluate", lambda *args: 1 / 0)  # no branch is evaluated apart
    assert same(run(lazy, calls), expected)
    assert reused(lazy) == table


def test_what_only_a_body_reads_is_left_out_where_it_is_reused() -> None:
    lazy, seen = fresh(), set[str]()

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.update(str(node.target).split(".")[1] for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module.forward

    lazy.policy = Scheduled(CacheSchedule(np.array([[1, 1], [0, 0]], dtype=bool)))
    lazy.compile(backend=backend)
    run(lazy, trajectory(SMALL, steps=1))
    assert {"layer_norm", "linear"} <= seen
    seen.clear()
    run(lazy, trajectory(SMALL, steps=2)[1:])
    assert "add" in seen
    assert not {"layer_norm", "linear", "scaled_dot_product_attention"} & seen


def test_the_original_may_be_compiled_too() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=2)
    run(lazy, calls[:1])
    torch.compile(lazy.original, backend="eager")(**calls[0])
    run(lazy, calls[1:])
    assert lazy.stats.captures == 1
    assert lazy.stats.reuse_table.shape[0] == 2  # the trajectory goes on


def test_a_graph_that_is_captured_later_is_compiled_too_and_shares_the_pieces() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=2)
    lazy.compile(backend="eager")
    run(lazy, calls)
    lazy.original.something = 1
    lazy.reset()
    run(lazy, calls)
    assert counters["stats"]["unique_graphs"] == lazy.compilations == PIECES


def test_blocks_share_their_code() -> None:
    lazy = lazy_compile.transform(DIT.model(), call(DIT))
    lazy.compile(backend="eager")
    calls = trajectory(DIT, steps=3)
    compiled = run(lazy, calls)
    blocks = len(lazy.branches) // 2
    assert blocks > 1
    assert lazy.compilations < len(lazy.branches) + 3
    assert same(compiled, run(DIT.model(), calls))


def test_what_goes_wrong_in_a_compiled_model_leaves_no_trace() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=STEPS)
    lazy.compile(backend="eager")
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    expected = run(lazy, calls)
    lazy.reset()
    outputs = run(lazy, calls[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnownStep, "keep", lambda step, index, kept: step.drop(1) if index else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(lazy, calls[2:3])
    assert same(outputs + run(lazy, calls[2:]), expected)


def test_weights_that_change_are_followed() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=4)
    lazy.compile(backend="eager")
    run(lazy, calls[:2])
    with torch.no_grad():
        for parameter in lazy.original.parameters():
            parameter.mul_(1.5)
    lazy.original.mlp = MLP()  # and a module that is replaced
    lazy.reset()
    assert same(run(lazy, calls), run(lazy.original, calls))


def test_options_that_torch_compile_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="'nope': 1"):
        fresh().compile(nope=1)


@pytest.mark.slow
def test_inductor_makes_what_eager_mode_makes() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=STEPS)
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    expected = run(lazy, calls)
    lazy.compile()
    lazy.reset()
    for seen, wanted in zip(run(lazy, calls), expected, strict=True):
        torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == lazy.compilations > PIECES  # those that reuse end in an arm of theirs


def test_an_uncompiled_lazy_model_compiles_nothing() -> None:
    lazy = lazy_compile.transform(SMALL.model())
    run(lazy, trajectory(SMALL, steps=2))
    assert counters["stats"]["unique_graphs"] == 0
