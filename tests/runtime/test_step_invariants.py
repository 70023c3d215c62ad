"""What stays the same along a trajectory is computed once, and the results are the original's bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, LazyModule, Scheduled
from support.toy_models import TOYS, randomize, trajectory

STEPS = 5


def cross() -> nn.Module:
    return randomize(TOYS["cross"].build()).eval()


@cache
def captured(hoist: bool) -> LazyModule:
    return lazy_compile.transform(cross(), trajectory(TOYS["cross"])[0], hoist_step_invariants=hoist)


@pytest.fixture
def lazy() -> LazyModule:
    return shared()


def shared(hoist: bool = True) -> LazyModule:
    """Captured once, without caches or statistics. Leave its weights."""
    lazy = captured(hoist)
    lazy.policy = AlwaysCompute()
    lazy.reset()
    lazy.reset_stats()
    return lazy


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    """Of one trajectory: the latents and the time change, the text is one tensor."""
    steps = trajectory(TOYS["cross"], steps=STEPS)
    text = steps[0]["text"]
    return [{**step, "text": text} for step in steps]


class CountsPrologues:
    """How often any graph of a model computed what stays the same."""

    def __init__(self, lazy: LazyModule) -> None:
        self.count, self._watched = 0, set[int]()
        store, hoisted = lazy._store, lazy._store.hoisted

        def watched(*arguments: Any) -> Any:
            graph = hoisted(*arguments)
            prologue = graph.program.prologue
            if prologue is not None and id(prologue) not in self._watched:
                self._watched.add(id(prologue))
                prologue.register_forward_hook(self._counts)
            return graph

        store.hoisted = watched  # type: ignore[method-assign]

    def _counts(self, *_: Any) -> None:
        self.count += 1


def answers(denoiser: nn.Module, calls: list[dict[str, Any]]) -> Iterator[Tensor]:
    for arguments in calls:
        yield denoiser(**arguments)


def assert_identical(lazy: LazyModule, calls: list[dict[str, Any]], context: Any = torch.no_grad) -> None:
    with context():
        for seen, expected in zip(answers(lazy, calls), answers(lazy.original, calls), strict=True):
            assert torch.equal(seen, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_is_computed_once_a_trajectory(
    lazy: LazyModule, calls: list[dict[str, Any]], context: type[AbstractContextManager[None]]
) -> None:
    prologues = CountsPrologues(lazy)
    assert_identical(lazy, calls, context)
    assert prologues.count == 1
    assert_identical(lazy, calls, context)
    assert prologues.count == 2
    assert lazy.stats.captures == 1
    (graph,) = lazy.graph.hoisted.values()
    assert list(lazy.graph.hoisted) == [frozenset({"text"})]
    assert [branch.name for branch in graph.branches] == [branch.name for branch in lazy.branches]
    assert graph.program.prologue is not None


def test_a_copy_with_the_same_values_is_the_same(lazy: LazyModule, calls: list[dict[str, Any]]) -> None:
    prologues = CountsPrologues(lazy)
    assert_identical(lazy, [{**each, "text": each["text"].clone()} for each in calls])
    assert prologues.count == 1


def test_other_values_are_noticed(lazy: LazyModule, calls: list[dict[str, Any]]) -> None:
    prologues = CountsPrologues(lazy)
    for each in calls[3:]:
        each["text"] = each["text"] + 1.0
    calls[4]["text"] = calls[3]["text"]
    assert_identical(lazy, calls)
    assert prologues.count == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_that_were_written_over_are_noticed(
    lazy: LazyModule, calls: list[dict[str, Any]], context: type[AbstractContextManager[None]]
) -> None:
    with context():
        text = calls[0]["text"].clone()
        for step, arguments in enumerate(calls):
            if step == 3:
                text.add_(1.0)
            arguments["text"] = text
            assert torch.equal(lazy(**arguments), lazy.original(**arguments)), step


def test_an_array_that_was_written_over_is_noticed(lazy: LazyModule, calls: list[dict[str, Any]]) -> None:
    array = calls[0]["text"].numpy().copy()
    text = torch.from_numpy(array)
    with torch.no_grad():
        for step, arguments in enumerate(calls):
            if step == 3:
                array += 1.0
            arguments["text"] = text
            assert torch.equal(lazy(**arguments), lazy.original(**arguments)), step


def test_a_weight_that_is_changed_on_the_way_takes_effect(calls: list[dict[str, Any]]) -> None:
    model = cross()
    lazy = lazy_compile.transform(model)
    with torch.no_grad():
        for step, arguments in enumerate(calls):
            if step == 3:
                next(model.text.parameters()).mul_(2.0)
            assert torch.equal(lazy(**arguments), model(**arguments)), step


def test_two_streams_keep_theirs(lazy: LazyModule, calls: list[dict[str, Any]]) -> None:
    prologues = CountsPrologues(lazy)
    other = torch.randn(calls[0]["text"].shape, generator=torch.Generator().manual_seed(3))
    assert_identical(lazy, [{**each, "text": text} for each in calls for text in (each["text"], other)])
    assert prologues.count == 2


def test_branches_reuse_across_it(calls: list[dict[str, Any]]) -> None:
    """The caches of the first call serve those that hand over; a schedule gives what it gives without."""
    results = []
    for hoist in (True, False):
        lazy = shared(hoist)
        lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
        with torch.no_grad():
            results.append(list(answers(lazy, calls)))
        assert lazy.stats.lazy_ratio == pytest.approx(2 / 5)
        assert bool(lazy.graph.hoisted) == hoist
    assert all(map(torch.equal, *results))


def test_gradients_reach_the_weights_at_every_call(lazy: LazyModule, calls: list[dict[str, Any]]) -> None:
    model = lazy.original
    for arguments in calls:
        grads = []
        for denoiser in (lazy, model):
            model.zero_grad(set_to_none=True)
            denoiser(**arguments).square().mean().backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        for seen, expected in zip(*grads, strict=True):
            torch.testing.assert_close(seen, expected)


def test_memory_is_accounted_for_and_given_back(calls: list[dict[str, Any]]) -> None:
    kept = []
    for hoist in (True, False):
        lazy = shared(hoist)
        assert_identical(lazy, calls)
        kept.append(lazy.cache_bytes)
        lazy.reset()
        assert lazy.cache_bytes == 0
    assert kept[0] > kept[1]
