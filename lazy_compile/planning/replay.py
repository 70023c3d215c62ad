"""Trajectories under schedules, of any denoiser that can be stopped and restarted where a decision is another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.runtime.sampling import Sampler, again


class ReplayableCall(Protocol):
    """One call of a denoiser, placed in its trajectory and not yet answered."""

    @property
    def step(self) -> int: ...

    def follow(self, schedule: CacheSchedule) -> Any:
        """Run the model as the schedule says; its return value."""

    def computed(self) -> Mapping[int, Sequence[Tensor]]:
        """What each branch that computed in this call keeps of its outputs, once it was followed."""

    def state(self) -> Any:
        """What is cached before this call; None if nothing is. Nothing writes to it."""

    def restore(self, state: Any) -> None:
        """Continue from there."""


Driver = Callable[[ReplayableCall], Any]


@dataclass(frozen=True)
class Replayable:
    """A denoiser whose calls can be answered from memory, and continued from any of them.

    Attributes:
        denoiser: what a sampler calls.
        branches, total_macs: of the model.
        leaders: for each branch the one that decides for it.
        order: to which what is reused is extrapolated; 0 repeats it.
        warmup_steps: the first steps, which compute whatever a schedule says.
        call_handler: a context within which a driver answers every call.
    """

    denoiser: Any
    branches: Sequence[ResidualBranch]
    total_macs: int
    leaders: Sequence[int]
    order: int
    warmup_steps: int
    call_handler: Callable[[Driver], AbstractContextManager[None]]


def replayable(denoiser: Any) -> Replayable:
    """
    Raises:
        ConfigError: calls of this denoiser cannot be continued from where they were.
    """
    if isinstance(denoiser, LazyModule):
        config, graph = denoiser.lazy_config, denoiser.graph

        def call_handler(driver: Driver) -> AbstractContextManager[None]:
            return denoiser.call_handler(lambda call: driver(_LazyCall(denoiser, call)))

        return Replayable(
            denoiser, graph.branches, graph.total_macs, graph.leaders(config.group), config.values_kept - 1,
            config.warmup_steps, call_handler,
        )  # fmt: skip
    if hasattr(denoiser, "replayable"):
        result: Replayable = denoiser.replayable()
        return result
    raise ConfigError(
        f"plan() takes what transform() returned, or an EngineDenoiser around a runner; seen {type(denoiser).__name__}"
    )


@dataclass(frozen=True)
class _Continued(Scheduled):
    """A schedule from which another one may go on at any step: what that reuses is cached, too."""

    def step_table(self, branches: int) -> None:
        return None


@dataclass(frozen=True)
class _LazyCall:
    lazy: LazyModule
    call: ModelCall

    @property
    def step(self) -> int:
        return self.call.step

    def follow(self, schedule: CacheSchedule) -> Any:
        config, draft = self.lazy.lazy_config, self.call.caches.draft()
        leaders = self.call.graph.leaders(config.group)
        result = self.call.run(PolicyStep(_Continued(schedule), config, draft, self.call.groups, leaders=leaders))
        self.call.caches.adopt(draft)
        return result

    def computed(self) -> Mapping[int, Sequence[Tensor]]:
        slots, branches = self.call.caches.slots, self.call.graph.branches
        return {
            index: slot.format.load(slot.values, branches[index], slot.values[0].device)
            for index, slot in slots.items()
            if (slot.computed_at == self.step).all()
        }

    def state(self) -> Any:
        return self.call.caches.draft() if self.call.caches.slots else None

    def restore(self, state: Any) -> None:
        self.call.caches.adopt(state.draft())


@dataclass(frozen=True)
class Trajectory:
    """What was run, call by call.

    Attributes:
        schedule: what it followed.
        samples: what came of it.
        steps: which step each call was.
        results: what the model returned.
        states: what was cached before each call; None where that was not kept.
        calls: how many of them were run, and not repeated from memory.
        keep_every: another trajectory can start at steps that this divides; 0 for none.
    """

    schedule: CacheSchedule
    samples: Tensor
    steps: tuple[int, ...]
    results: tuple[Any, ...]
    states: tuple[Any, ...]
    calls: int
    keep_every: int = 1

    def continues_at(self, schedule: CacheSchedule) -> int:
        """The step from which another schedule has to be run, what is before it being known."""
        return continued_at(self.schedule, schedule, self.keep_every)


def run_trajectory(
    target: Replayable,
    sample: Sampler,
    seed: int,
    schedule: CacheSchedule,
    base: Trajectory | None = None,
    keep_every: int = 1,
    on_call: Callable[[ReplayableCall], None] | None = None,
) -> Trajectory:
    """Run a schedule from noise of ``seed``; what ``base``, from the same noise, did before the first decision that is
    another is repeated from memory. Others can start from this one at every ``keep_every``-th step, before which its
    caches are kept; with 0 at none. ``on_call`` gets every call that was run."""
    begin = 0 if base is None else base.continues_at(schedule)
    steps: list[int] = []
    results: list[Any] = []
    states: list[Any] = []
    ran = 0

    def answer(call: ReplayableCall) -> Any:
        nonlocal ran
        place = len(steps)
        steps.append(call.step)
        if base is not None and call.step < begin:
            states.append(base.states[place])
            results.append(base.results[place])
            return _copy(base.results[place])
        keep = keep_every > 0 and call.step % keep_every == 0
        state = call.state() if keep or base is not None else None
        if state is None and base is not None and base.states[place] is not None:
            state = base.states[place]
            call.restore(state)
        states.append(state if keep else None)
        result = call.follow(schedule)
        if on_call is not None:
            on_call(call)
        results.append(_copy(result))
        ran += 1
        return result

    with torch.no_grad(), target.call_handler(answer):
        samples = sample(target.denoiser, seed).detach().clone()
    return Trajectory(schedule, samples, tuple(steps), tuple(results), tuple(states), ran, keep_every)


def replayed_steps(target: Replayable, sample: Sampler, seed: int) -> int:
    """The steps of a trajectory, found with a single call of the model: its answer is given at every call, by
    :func:`~lazy_compile.runtime.sampling.again`.

    Raises:
        ConfigError: there are fewer than two.
    """
    answers: list[Any] = []
    steps = calls = 0

    def answer(call: ReplayableCall) -> Any:
        nonlocal steps, calls
        steps, calls = max(steps, call.step + 1), calls + 1
        if not answers:
            answers.append(call.follow(CacheSchedule.always_compute(1, len(target.branches))))
        return again(answers[0], calls)

    with torch.no_grad(), target.call_handler(answer):
        sample(target.denoiser, seed)
    if steps < 2:
        raise ConfigError(f"the sampler ran {steps} step(s) of the model; at least 2 are needed to reuse anything")
    return steps


def first_change(before: CacheSchedule, after: CacheSchedule) -> int:
    """The first step at which two schedules of the same size do not do the same; their length if there is none."""
    different = before.should_compute != after.should_compute
    slopes = [np.ones(each.should_compute.shape) if each.slopes is None else each.slopes for each in (before, after)]
    different |= (slopes[0] != slopes[1]) & ~after.should_compute
    found = np.flatnonzero(different.any(axis=1))
    return int(found[0]) if len(found) else before.steps


def continued_at(before: CacheSchedule, after: CacheSchedule, keep_every: int) -> int:
    """The same, where caches were kept before every ``keep_every``-th step alone."""
    change = first_change(before, after)
    return change // keep_every * keep_every if keep_every else 0


def _copy(result: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
