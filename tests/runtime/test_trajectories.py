"""A lazy model minds its own trajectories and streams."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.bench.simulated_memory import SimulatedMemory
from lazy_compile.runtime import trajectory as trajectory_module
from lazy_compile.runtime.fingerprint import read
from support.layers import TOKENS, WIDTH
from support.small_model import ALWAYS, NEVER, RISING, SMALL, STEPS, Decides, reused, run, same
from support.toy_models import TOYS, call, trajectory

Compiled = Callable[..., LazyModule]

TIMES = (900.0, 750.0, 600.0, 450.0, 300.0, 150.0)


@cache
def lazy_model() -> LazyModule:
    """Captured once; setting a policy makes it forget."""
    return lazy_compile.transform(SMALL.model(), call(SMALL))


def test_a_new_trajectory_starts_without_help(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    graph = lazy.graph
    calls = trajectory(TOYS["dit"], steps=STEPS)
    first, other = run(lazy, calls), run(lazy, trajectory(TOYS["dit"], steps=STEPS, seed=1))
    second = run(lazy, calls)
    assert same(first, second)
    assert not same(first, other)
    assert [row[0] for row in reused(lazy)] == [0.0, *[1.0] * (STEPS - 1)]
    assert lazy.stats.calls == 3 * STEPS
    assert lazy.graph is graph


def test_two_calls_a_step_are_two_streams(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = Scheduled(CacheSchedule.random(0.5, STEPS + 1, 4, seed=0))  # caches for a step to come
    conditional = trajectory(TOYS["dit"], steps=STEPS)
    unconditional = [{**arguments, "y": torch.zeros(2, dtype=torch.int64)} for arguments in conditional]
    alone = [run(lazy, calls) for calls in (conditional, unconditional)]
    one_stream = lazy.cache_bytes
    for _ in range(2):  # the second image as well
        together = run(lazy, [call for pair in zip(conditional, unconditional, strict=True) for call in pair])
        assert same(together[0::2], alone[0])
        assert same(together[1::2], alone[1])
    assert lazy.cache_bytes == 2 * one_stream > 0


def test_guidance_in_one_batch_keeps_its_rows_apart(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = Decides(lambda step, branch: [True, False, step % 2 == 0, False])
    calls = trajectory(TOYS["dit"], 4, steps=STEPS)
    run(lazy, calls)
    assert reused(lazy) == [[0.0] * 4] + [[0.5 if step % 2 == 0 else 0.75] * 4 for step in range(1, STEPS)]


def test_rising_time_is_learned_in_the_first_trajectory() -> None:
    lazy = lazy_compile.transform(RISING.model())
    schedule = CacheSchedule(np.array([[1, 1], [1, 1], [0, 0], [1, 0], [0, 0], [1, 1]], dtype=bool))
    lazy.policy = Scheduled(schedule)
    calls = trajectory(RISING, steps=STEPS)
    first, second = run(lazy, calls), run(lazy, calls)
    assert same(first[:2], second[:2])
    lazy.reset_stats()
    third = run(lazy, calls)
    assert same(second, third)
    assert reused(lazy) == (1.0 - schedule.should_compute).tolist()


def test_the_first_trajectory_of_rising_time_follows_the_schedule_once_it_is_known() -> None:
    lazy = lazy_compile.transform(RISING.model())
    lazy.policy = Scheduled(CacheSchedule(np.array([[1, 1], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0]], dtype=bool)))
    calls = trajectory(RISING, steps=STEPS)
    first, second = run(lazy, calls), run(lazy, calls)
    assert same(first, second)


def test_a_model_without_time_counts_its_calls_and_is_reset_by_hand(compiled: Compiled) -> None:
    lazy = compiled("no_time")
    lazy.policy = policy = Decides(lambda step, branch: step % 3 == 0)
    calls = trajectory(TOYS["no_time"], steps=4)
    first = run(lazy, calls)
    assert policy.timesteps[::2] == [1.0, 2.0, 3.0]
    lazy.reset()
    assert same(run(lazy, calls), first)


def test_the_time_of_a_query_is_the_models_own(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = policy = Decides(lambda step, branch: True)
    run(lazy, trajectory(TOYS["dit"], steps=4))
    assert policy.timesteps[::4] == [749.0, 500.0, 250.0]


@pytest.mark.parametrize("called", [2, 4, 6])
@pytest.mark.parametrize(("start", "own_noise"), [(1, False), (3, False), (5, False), (4, True)])
def test_image_to_image_from_the_noise_of_another_request_begins_anew(called: int, start: int, own_noise: bool) -> None:
    """A request is abandoned or done; the next one starts in the middle, from its result and the same noise."""
    lazy = lazy_model()

    def steps(x: Tensor, first: int = 0) -> Iterator[Tensor]:
        for time in TIMES[first:]:
            with torch.no_grad():
                x = x - 0.05 * lazy(x=x, t=torch.tensor([time]))
            yield x

    noise, other = (torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    lazy.policy = ALWAYS
    *_, image = steps(noise)
    share = TIMES[start] / 1000.0
    begun = (1.0 - share) * image + share * (other if own_noise else noise)
    lazy.policy = Scheduled(CacheSchedule.every(2, len(TIMES), len(lazy.branches)))
    alone = list(steps(begun, start))
    lazy.reset()
    list(islice(steps(noise), called))
    assert same(list(steps(begun, start)), alone)


def test_a_sampler_that_adds_noise_now_and_then_goes_on_counting() -> None:
    """Noise at two steps, as churn adds it: the first of them cannot be told from another request, and computes."""
    lazy = lazy_model()
    lazy.policy = policy = Decides(lambda step, branch: True)
    steps: list[int] = []
    policy.decide = lambda step, branch: steps.append(step) is None  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator)
    for index, time in enumerate(TIMES):
        if index in (3, 4):
            x = x + 0.2 * torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            x = x - 0.05 * lazy(x=x, t=torch.tensor([time]))
    assert steps[:: len(lazy.branches)] == [1, 2, 4, 5]  # nobody asks at the first step of a trajectory


def test_threads_have_streams_of_their_own() -> None:
    lazy = lazy_compile.transform(SMALL.model())  # the threads also race for the capture
    lazy.policy = Scheduled(CacheSchedule.random(0.5, STEPS, 2, seed=2))
    seeds = range(4)
    results: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(len(seeds), timeout=60)

    def work(seed: int) -> None:
        barrier.wait()
        calls = trajectory(SMALL, steps=STEPS, seed=seed)
        run(lazy, calls)
        results[seed] = run(lazy, calls)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lazy.stats.captures == 1
    assert lazy.stats.evaluated.sum() == 4 * 2 * STEPS * 2 * 2  # threads, runs, steps, branches, rows
    for seed in seeds:
        calls = trajectory(SMALL, steps=STEPS, seed=seed)
        run(lazy, calls)
        assert same(results[seed], run(lazy, calls))


def test_what_another_thread_is_reading_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SMALL.model()
    lazy = lazy_compile.transform(model, call(SMALL))
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    entered, leave = threading.Event(), threading.Event()

    def held(tensors: dict[str, Tensor]) -> Any:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert leave.wait(60)
        return read(tensors)

    def stepped(x: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            return x - 9.0 * lazy(x=x, t=torch.full((len(x),), 900.0 - 150 * step))

    first, other = call(SMALL, seed=1)["x"], call(SMALL, seed=2)["x"]
    expected = stepped(stepped(first, 0), 1)
    lazy.reset()
    halfway = stepped(first, 0)
    monkeypatch.setattr(trajectory_module, "read", held)
    thread = threading.Thread(target=stepped, args=(other, 0))
    thread.start()
    assert entered.wait(60)
    seen = stepped(halfway, 1)
    leave.set()
    thread.join()
    assert torch.equal(seen, expected)


def test_named_streams_are_trajectories_of_their_own(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    calls = [trajectory(TOYS["dit"], steps=STEPS, seed=seed) for seed in (1, 2)]
    alone = [run(lazy, each) for each in calls]
    lazy.reset()
    together: list[list[Tensor]] = [[], []]
    for step in range(STEPS):
        for number in (0, 1):
            with lazy.stream(f"request {number}"):
                later = max(0, step - 2 * number)  # the second request is two steps behind
                together[number] += run(lazy, [calls[number][later]]) if step >= 2 * number else []
    assert same(together[0], alone[0])
    assert same(together[1], alone[1][: STEPS - 2])


def test_reset_makes_the_next_call_compute(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    calls = trajectory(TOYS["dit"], steps=3)
    run(lazy, calls[:2])
    assert lazy.cache_bytes > 0
    lazy.reset()
    assert lazy.cache_bytes == 0
    assert same(run(lazy, calls[2:]), run(lazy.original, calls[2:]))


@pytest.mark.parametrize("forget", [LazyModule.reset, lambda lazy: lazy.end_trajectory("request")])
def test_what_is_forgotten_is_freed_at_once(compiled: Compiled, forget: Callable[[LazyModule], None]) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    gc.disable()
    try:
        with SimulatedMemory(lazy.graph.state()) as memory, lazy.trajectory("request"):
            run(lazy, trajectory(TOYS["dit"], steps=3))
        cached, before = lazy.cache_bytes, memory.held["host"]
        forget(lazy)
        assert before - memory.held["host"] >= cached > 0
    finally:
        gc.enable()


def test_a_new_policy_starts_a_trajectory(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    run(lazy, calls[:2])
    lazy.policy = NEVER
    assert same(run(lazy, calls[2:]), run(lazy.original, calls[2:]))
