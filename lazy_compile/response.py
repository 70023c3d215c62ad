"""How the final samples answer to any change of any branch's output: to first order, around one schedule.

Planning asks what many schedules would do to the final samples. Near a schedule that was run, the answer is linear:
the change of the samples is the sum, over steps and branches, of ``J @ (other output - this output)``, and every output
that another schedule would use is a combination of what the branch computes at this step and computed at earlier ones.
So it suffices to know ``J @ f`` for each of these. A random direction v in the space of samples gives ``v @ J`` for all
steps and branches in one backward pass through the trajectory, and the mean of ``(v @ change) ** 2`` over directions is
the squared change (Hutchinson).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.effects import DenseStep, Sampler
from lazy_compile.errors import ConfigError
from lazy_compile.lazy_branch import LazyBranch
from lazy_compile.module import LazyModule, ModelCall
from lazy_compile.runtime import CacheState
from lazy_compile.schedule import CacheSchedule

Floats = npt.NDArray[np.float64]

MAX_AGE = 10
"""Steps that are looked back: an older output counts as one of this age."""


class NoGradientError(ConfigError):
    """The samples do not depend on the model in a way that can be differentiated."""


@dataclass(frozen=True)
class Response:
    """First-order effects on the final samples around ``schedule``.

    Attributes:
        schedule: what was run, with its slopes.
        answer: ``float32[N, T, G, MAX_AGE + 1]``: along each of N directions, the change of the samples per output that
            branch g computed ``age`` steps before step t, were it returned at step t.
        error: ``float64[N]``: along each direction, samples under the schedule less dense samples.
        size: numbers in one sample; the mean of ``error ** 2`` over it is the mean squared error.
    """

    schedule: CacheSchedule
    answer: npt.NDArray[np.float32]
    error: Floats
    size: int

    def of_single_reuses(self, linear: bool) -> Floats:
        """``float64[T, G]``: mean squared change of the final samples if one branch reuses at one step.

        Of an otherwise dense trajectory; NaN at step 0.
        """
        now, before = self.answer[..., 0], self.answer[..., 1]
        line = 2 * before - self.answer[..., 2] if linear else before
        line[:, :2] = before[:, :2]
        effect: Floats = np.square(line - now, dtype=np.float64).mean(axis=0) / self.size
        effect[0] = np.nan
        return effect

    def tied(self, leaders: Sequence[int]) -> Response:
        """The same for the branches that decide: what follows one of them answers with it."""
        deciding = sorted(set(leaders))
        answer = np.stack([self.answer[:, :, np.equal(leaders, leader)].sum(axis=2) for leader in deciding], axis=2)
        return replace(self, schedule=self.schedule.of(deciding), answer=answer)


def dense_samples(lazy: LazyModule, sample: Sampler, seed: int) -> Tensor:
    with torch.no_grad(), lazy.driven_by(lambda call: call.run(DenseStep())):
        return sample(lazy, seed)


def measure_response(
    lazy: LazyModule, sample: Sampler, schedule: CacheSchedule, *, seed: int, directions: int
) -> Response:
    """Run one trajectory under ``schedule`` in which every branch also computes, and go back through it.

    Takes the activations of a whole trajectory in memory, and the time of ``1 + 2 * directions`` dense trajectories.

    Raises:
        NoGradientError: the sampler detaches its samples or runs in inference mode.
    """
    dense = dense_samples(lazy, sample, seed)
    trace = _Trace(schedule)
    with torch.enable_grad(), lazy.driven_by(trace.drive):
        samples = sample(lazy, seed)
    if not samples.requires_grad:
        raise NoGradientError(
            "the samples carry no gradient; give a sampler that returns what its last step gives, and that does not "
            "detach it or run under torch.inference_mode (torch.no_grad is fine)"
        )
    error, by_sample = (samples - dense).detach(), trace.rows_are_samples(samples)
    generator = torch.Generator().manual_seed(seed)
    answers, errors = [], []
    for position in range(directions):
        direction = torch.randn(error.shape, generator=generator).to(error)
        answers.append(trace.answer(samples, direction, by_sample, keep=position < directions - 1))
        along = (direction * error).flatten(1).sum(1)
        errors.append(along if by_sample else along.sum(0, keepdim=True))
    size = error[0].numel() if by_sample else error.numel()
    return Response(schedule, torch.cat(answers).cpu().numpy(), torch.cat(errors).double().cpu().numpy(), size)


@dataclass
class _Call:
    """One call of the model: what each branch computed, and where a change of what it returned is felt."""

    computed: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    probes: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass
class _Stream:
    """The calls of one stream by step, and for each branch its last two computations: step and outputs."""

    caches: CacheState
    calls: dict[int, _Call] = field(default_factory=dict)
    history: dict[int, list[tuple[int, tuple[Tensor, ...]]]] = field(default_factory=dict)


@dataclass
class _Trace:
    """A differentiable trajectory under a schedule."""

    schedule: CacheSchedule
    streams: dict[int, _Stream] = field(default_factory=dict)
    axes: dict[int, list[int | None]] = field(default_factory=dict)

    def drive(self, call: ModelCall) -> Any:
        torch.set_grad_enabled(True)  # until the sampler's own torch.no_grad ends
        stream = self.streams.setdefault(id(call.caches), _Stream(call.caches))
        stream.calls[call.step] = _Call()
        state = [value.detach() for value in call.state]
        return replace(call, state=state).run(_TracedStep(self, stream, call.step))

    def rows_are_samples(self, samples: Tensor) -> bool:
        """Whether row r of every branch belongs to sample ``r % B``, seen from what reaches the first sample."""
        first = torch.zeros_like(samples)
        first[0] = 1.0
        for stream in self.streams.values():
            for branch, probes in stream.calls[max(stream.calls)].probes.items():
                felt = torch.autograd.grad(samples, probes, first, retain_graph=True, materialize_grads=True)
                for gradient, axis in zip(felt, self.axes[branch], strict=True):
                    if axis is None or gradient.shape[axis] % len(samples):
                        return False
                    rows = gradient.movedim(axis, 0).flatten(1).abs().sum(1).reshape(-1, len(samples))
                    if rows[:, 1:].any():
                        return False
        return True

    def answer(self, samples: Tensor, direction: Tensor, by_sample: bool, keep: bool) -> Tensor:
        """``float32[B, T, G, MAX_AGE + 1]`` along one direction for each sample, or ``[1, ...]`` for all together."""
        places = [
            (stream.calls, step, branch)
            for stream in self.streams.values()
            for step, call in stream.calls.items()
            for branch in call.probes
        ]
        probes = [probe for calls, step, branch in places for probe in calls[step].probes[branch]]
        gradients = iter(torch.autograd.grad(samples, probes, direction, retain_graph=keep, materialize_grads=True))
        count = len(samples) if by_sample else 1
        result = torch.zeros(count, self.schedule.steps, self.schedule.branches, MAX_AGE + 1)
        for calls, step, branch in places:
            felt = [next(gradients) for _ in calls[step].probes[branch]]
            for age in range(MAX_AGE + 1):
                if step - age in calls:
                    each = zip(felt, calls[step - age].computed[branch], self.axes[branch], strict=True)
                    sums = [
                        _sums(gradient * value, axis if by_sample else None, count) for gradient, value, axis in each
                    ]
                    result[:, step, branch, age] += torch.stack(sums).sum(0).cpu()
        return result


@dataclass
class _TracedStep:
    """Returns what the schedule says, and computes beside it what was not asked for."""

    trace: _Trace
    stream: _Stream
    step: int

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index, schedule = branch.branch.index, self.trace.schedule
        call, known = self.stream.calls[self.step], self.stream.history.setdefault(index, [])
        fresh = branch.compute(inputs)
        call.computed[index] = tuple(output.detach() for output in fresh)
        self.trace.axes[index] = [output.batch_axis for output in branch.branch.outputs]
        if not known or schedule.should_compute[self.step, index]:
            known.insert(0, (self.step, fresh))
            del known[2:]
            returned = fresh
        else:
            returned = self._reuse(known, 1.0 if schedule.slopes is None else float(schedule.slopes[self.step, index]))
        probes = tuple(torch.zeros_like(output).requires_grad_() for output in returned)
        call.probes[index] = probes
        return tuple(output + probe for output, probe in zip(returned, probes, strict=True))

    def _reuse(self, known: list[tuple[int, tuple[Tensor, ...]]], slope: float) -> tuple[Tensor, ...]:
        (at, values), *earlier = known
        if not earlier:
            return values
        before, previous = earlier[0]
        moved = slope * (self.step - at) / (at - before)
        return tuple(value + moved * (value - old) for value, old in zip(values, previous, strict=True))


def _sums(products: Tensor, axis: int | None, count: int) -> Tensor:
    """``float32[count]``: the products of each sample, or of all, summed."""
    if axis is None:
        return products.sum().reshape(1).float()
    return products.movedim(axis, 0).flatten(1).sum(1).reshape(-1, count).sum(0).float()
