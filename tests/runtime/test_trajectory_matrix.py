"""Every scheduler of diffusers with every style of guidance, in the situations in which caches were mixed up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from support.requests import GUIDANCES, STEPS, Request, in_turn, sampled, scheduler_names
from support.slow import slow_but
from support.toy_models import TOYS, call

FEW = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler")
RENEWED = {
    "CMStochasticIterativeScheduler": 0.0, "DDPMParallelScheduler": 0.1, "DDPMScheduler": 0.1,
    "FlowMatchLCMScheduler": 0.1,
}  # fmt: skip
"""Draw most of their latents anew in 8 steps, so that few calls can be proven to continue another: the least share of
the branches that are reused."""

MANY_CALLS = 64
"""More rows than any scheduler calls the model."""


@cache
def lazy_model() -> LazyModule:
    lazy = lazy_compile.transform(TOYS["cross"].model(), call(TOYS["cross"]))
    lazy.policy = Scheduled(CacheSchedule.every(2, MANY_CALLS, len(lazy.branches)))
    return lazy


def model(x: Tensor, time: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        return 0.1 * lazy_model()(x=x, timestep=time, text=text)


def alone(scheduler: str, guidance: str, seed: int) -> Tensor:
    lazy_model().reset()
    lazy_model().reset_stats()
    return sampled(Request(scheduler, seed, guidance), model)


def cancelled_before(scheduler: str, guidance: str) -> Tensor:
    for steps in (1, 3):
        cancelled = Request(scheduler, 7, guidance).calls(model)
        for _ in range(steps):
            next(cancelled, None)
    return sampled(Request(scheduler, 1, guidance), model)


def warmed_up(scheduler: str, guidance: str) -> Tensor:
    for seed in (5, 1):  # of another request, and of this one
        next(Request(scheduler, seed, guidance).calls(model))
    return sampled(Request(scheduler, 1, guidance), model)


def interleaved(scheduler: str, guidance: str) -> Tensor:
    requests = [Request(scheduler, seed, guidance) for seed in (1, 2, 3)]
    return in_turn(requests, model, [0, 1, 0, 2, 1, 1, 2, 0, 2, 2, 0, 1] * 3)[0]


def hopping_threads(scheduler: str, guidance: str) -> Tensor:
    request = Request(scheduler, 1, guidance)
    steps = request.calls(model)
    for _ in range(4 * STEPS):
        thread = threading.Thread(target=lambda: next(steps, None))
        thread.start()
        thread.join()
    return request.latents


SITUATIONS: dict[str, Callable[[str, str], Tensor]] = {
    function.__name__: function for function in (cancelled_before, warmed_up, interleaved, hopping_threads)
}


def check(scheduler: str, guidance: str, *, followed: bool = False) -> None:
    expected = alone(scheduler, guidance, seed=1)
    calls, ratio = lazy_model().stats.calls, lazy_model().stats.lazy_ratio
    assert calls >= STEPS - 1
    if followed and guidance not in ("interval", "toggled"):
        steps = lazy_model().stats.reuse_table
        assert len(steps) == calls // (2 if guidance.endswith("first") else 1)
        assert (steps == (np.arange(len(steps)) % 2)[:, None]).all(), f"{scheduler}, {guidance}: {steps[:, 0]}"
    assert ratio >= (0.3 if followed else RENEWED.get(scheduler, 0.3)), (
        f"{scheduler}, {guidance}: {ratio:.2f} is reused"
    )
    for name, situation in SITUATIONS.items():
        lazy_model().reset()
        difference = float((situation(scheduler, guidance) - expected).abs().max())
        assert difference <= 1e-5 * max(float(expected.abs().max()), 1.0), (
            f"{scheduler}, {guidance}, {name}: {difference}"
        )


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("scheduler", FEW)
def test_a_request_is_sampled_as_if_it_were_alone(scheduler: str, guidance: str) -> None:
    check(scheduler, guidance)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", scheduler_names())
def test_a_request_is_sampled_as_if_it_were_alone_with_every_scheduler(scheduler: str) -> None:
    for guidance in GUIDANCES:
        check(scheduler, guidance)


FOLLOWED = ("DDPMScheduler", "SASolverScheduler")


@pytest.mark.parametrize("scheduler", slow_but(FOLLOWED, scheduler_names()))
def test_a_scheduler_that_is_followed_reuses_as_its_schedule_says(
    scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever noise its steps add: what they made of the latents is known."""
    monkeypatch.setattr(Request, "follower", lazy_model()._trajectories)
    for guidance in GUIDANCES:
        check(scheduler, guidance, followed=True)


@pytest.mark.parametrize(
    "scheduler", [pytest.param(name, marks=() if name in FEW[:3] else pytest.mark.slow) for name in scheduler_names()]
)
@pytest.mark.filterwarnings("ignore::Warning")  # of schedulers, in threads, where catch_warnings() counts for all
def test_rows_that_change_places_or_are_replaced_keep_their_caches(scheduler: str) -> None:
    """Requests of one server in one batch: they swap places at every step, and one ends and makes room for another."""
    expected = {seed: alone(scheduler, "none", seed) for seed in (1, 2, 3)}
    lazy_model().reset()
    waiting: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    answers: dict[int, Tensor] = {}

    def asked(seed: int) -> Callable[..., Tensor]:
        def denoise(*inputs: Tensor) -> Tensor:
            waiting[seed] = inputs  # type: ignore[assignment]
            arrived[seed].set()
            answered[seed].wait(60)
            answered[seed].clear()
            return answers.pop(seed)

        return denoise

    arrived = {seed: threading.Event() for seed in expected}
    answered = {seed: threading.Event() for seed in expected}
    requests = {seed: Request(scheduler, seed) for seed in expected}
    threads = {seed: threading.Thread(target=sampled, args=(requests[seed], asked(seed))) for seed in expected}
    batch, late, step = [1, 2], [3], 0
    for seed in batch:
        threads[seed].start()
    while batch:
        for seed in batch:
            assert arrived[seed].wait(60)
            arrived[seed].clear()
        rows = batch[::-1] if step % 2 else batch
        outputs = model(*(torch.cat(part) for part in zip(*(waiting[seed] for seed in rows), strict=True)))
        for seed, output in zip(rows, outputs.split(1), strict=True):
            answers[seed] = output
            answered[seed].set()
        step += 1
        if step == 3:  # one request more, among the others
            threads[late[0]].start()
            batch = [*batch, *late]
        finished = [seed for seed in batch if _ends(threads[seed], arrived[seed])]
        batch = [seed for seed in batch if seed not in finished]
    for seed, latents in expected.items():
        assert torch.allclose(requests[seed].latents, latents, atol=1e-5 * max(float(latents.abs().max()), 1.0))


def _ends(thread: threading.Thread, arrived: threading.Event) -> bool:
    """Whether a request has no further call to make."""
    while thread.is_alive():
        if arrived.wait(0.01):
            return False
    return True
