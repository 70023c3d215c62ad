"""``torch.compile`` around a lazy model, and of its branches alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from support.small_model import SMALL, fresh, run, same
from support.toy_models import trajectory

STEPS = 20


@pytest.fixture(autouse=True)
def without_leftovers() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_lazy_model_runs_and_does_not_compile_again_from_step_to_step() -> None:
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


def test_compiled_branches_are_compiled_once_and_reused_as_before() -> None:
    lazy = fresh()
    lazy.policy = Scheduled(CacheSchedule.every(2, steps=STEPS, branches=2))
    calls = trajectory(SMALL, steps=STEPS)
    expected = run(lazy, calls)
    lazy.compile(backend="eager")
    lazy.reset()
    seen = run(lazy, calls)
    assert counters["stats"]["unique_graphs"] == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, expected, strict=True))
    assert lazy.stats.captures == 1
    lazy.original.something = 1  # a graph that is captured later is compiled too
    lazy.reset()
    run(lazy, calls)
    assert counters["stats"]["unique_graphs"] == 4


def test_an_uncompiled_lazy_model_compiles_nothing() -> None:
    lazy = lazy_compile.transform(SMALL.model())
    run(lazy, trajectory(SMALL, steps=2))
    assert counters["stats"]["unique_graphs"] == 0
