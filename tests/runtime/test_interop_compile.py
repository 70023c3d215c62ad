"""``torch.compile`` around a lazy model, and of its branches alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import lazy_compile
from lazy_compile import CacheSchedule, Policy, Scheduled
from lazy_compile.errors import ConfigError
from support.layers import MLP
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


PIECES = 5
"""Of the small model: two branches, and what lies before, between and behind them."""


def test_a_compiled_lazy_model_compiles_its_pieces_once_for_all_steps() -> None:
    lazy = fresh()
    lazy.policy = Scheduled(CacheSchedule.every(2, steps=STEPS, branches=2))
    calls = trajectory(SMALL, steps=STEPS)
    expected = run(lazy, calls)
    compiled = torch.compile(lazy, backend="eager")
    lazy.reset()
    run(compiled, calls[:2])
    frames = counters["stats"]["unique_graphs"], counters["frames"]["total"]
    lazy.reset()
    assert same(run(compiled, calls), expected)
    assert (counters["stats"]["unique_graphs"], counters["frames"]["total"]) == frames
    assert frames[0] == lazy.compilations == PIECES


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
    branch = lazy.graph.program.graph_module.get_submodule("lazy_branch_1")
    outputs = run(lazy, calls[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "forward", lambda *inputs: 1 / 0)
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
    assert lazy.compilations == PIECES


def test_an_uncompiled_lazy_model_compiles_nothing() -> None:
    lazy = lazy_compile.transform(SMALL.model())
    run(lazy, trajectory(SMALL, steps=2))
    assert counters["stats"]["unique_graphs"] == 0
