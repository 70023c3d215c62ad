"""How the final samples answer to any change of any branch's output: to first order, around one schedule.

Planning asks what many schedules would do to the final samples. Near a schedule that was run, the answer is linear:
the change of the samples is the sum, over steps and branches, of ``J @ (other output - this output)``, and every output
that another schedule would use is a combination of what the branch computes at this step and computed at earlier ones.
So it suffices to know ``J @ f`` for each of these. A random direction v in the space of samples gives ``v @ J`` for all
steps and branches in one backward pass through the trajectory, and the mean of ``(v @ change) ** 2`` over directions is
the squared change (Hutchinson).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from lazy_compile.errors import ConfigError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.sampling import DenseStep, Sampler, require_finite

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
        directional_derivatives: ``float32[N, T, G, MAX_AGE + 1]``:
            along each of N directions, the change of the samples per output that
            branch g computed ``age`` steps before step t, were it returned at step t.
        error: ``float64[N]``: along each direction, samples under the schedule less dense samples.
        size: numbers in one sample; the mean of ``error ** 2`` over it is the mean squared error.
        timesteps: ``float64[T]``, the time input at each step.
        sensitivity: ``float64[T]``, squared change of the samples per squared change of the model's output at a step.
        weight: ``float64[N]``, how much each direction counts, see :func:`cauchy_weights`; None: all alike.
    """

    schedule: CacheSchedule
    directional_derivatives: npt.NDArray[np.float32]
    error: Floats
    size: int
    weight: Floats | None = None
    timesteps: Floats | None = None
    sensitivity: Floats | None = None

    def of_single_reuses(self, linear: bool) -> Floats:
        """``float64[T, G]``: mean squared change of the final samples if one branch reuses at one step.

        Of an otherwise dense trajectory; NaN at step 0.
        """
        now, before = self.directional_derivatives[..., 0], self.directional_derivatives[..., 1]
        line = 2 * before - self.directional_derivatives[..., 2] if linear else before
        line[:, :2] = before[:, :2]
        effect: Floats = np.square(line - now, dtype=np.float64).mean(axis=0) / self.size
        effect[0] = np.nan
        return effect

    @property
    def weights(self) -> Floats:
        return np.ones(len(self.error)) if self.weight is None else self.weight

    def of_sample(self, row: int, samples: int) -> Response:
        """What it says of one sample alone, where rows could be distinguished."""
        weight = None if self.weight is None else self.weight[row::samples]
        derivatives, error = self.directional_derivatives[row::samples], self.error[row::samples]
        return replace(self, directional_derivatives=derivatives, error=error, weight=weight)

    @classmethod
    def joined(cls, responses: Sequence[Response]) -> Response:
        """The directions of all, which were measured around one schedule."""
        answer, error, weight = (
            np.concatenate([getattr(response, name) for response in responses])
            for name in ("directional_derivatives", "error", "weights")
        )
        return cls(responses[0].schedule, answer, error, responses[0].size, weight)


def dense_samples(lazy: LazyModule, sample: Sampler, seed: int) -> Tensor:
    """What others are held against: a copy, since a sampler may write its next samples to the same memory.

    Raises:
        ConfigError: they are not finite.
    """
    with torch.no_grad(), lazy.call_handler(lambda call: call.run(DenseStep())):
        samples = sample(lazy, seed).clone()
    require_finite(samples)
    return samples


def cauchy_weights(error: Floats) -> Floats:
    """``1 / (1 + error / median)``: how far to believe a first-order model for samples of these mean squared errors.

    A sample that turned into another picture says nothing of how to keep it. The weights are those of a Cauchy loss,
    ``log(1 + error / median)``.
    """
    typical = float(np.median(error))
    return 1 / (1 + error / typical) if typical > 0 else np.ones_like(error)


def measure_response(
    lazy: LazyModule,
    sample: Sampler,
    schedule: CacheSchedule,
    *,
    seed: int,
    directions: int = 1,
    rows_are_samples: bool | None = None,
) -> Response:
    """Run one trajectory under ``schedule`` in which every branch also computes, and go back through it.

    Takes the time of ``2 + 3 * directions`` dense trajectories. In memory are the outputs of all branches at all steps,
    and of the other activations those of one call: a call is repeated on the way back.

    Args:
        lazy, sample: what to run.
        schedule: what to run it under.
        seed: of the noise and the directions.
        directions: measured one after the other.
        rows_are_samples: whether samples are distinguished, as was found for this graph and sampler before; None
            finds out, by going back through the last step once more.

    Raises:
        NoGradientError: the sampler detaches its samples or runs in inference mode.
        ConfigError: samples or their gradients are not finite.
    """
    dense = dense_samples(lazy, sample, seed)
    trace = _Trace(schedule)
    with torch.enable_grad(), lazy.call_handler(trace.drive):
        samples = sample(lazy, seed)
    if not samples.requires_grad:
        raise NoGradientError(
            "the samples carry no gradient; give a sampler that returns what its last step gives, and that does not "
            "detach it or run under torch.inference_mode (torch.no_grad is fine)"
        )
    error, by_sample = (samples - dense).detach(), rows_are_samples
    if by_sample is None:
        by_sample = trace.rows_are_samples(samples)
    generator = torch.Generator().manual_seed(seed)
    answers, errors = [], []
    for position in range(directions):
        direction = torch.randn(error.shape, generator=generator).to(error)
        answers.append(trace.answer(samples, direction, by_sample, keep=position < directions - 1))
        along = (direction * error).flatten(1).sum(1)
        errors.append(along if by_sample else along.sum(0, keepdim=True))
    trace.release()
    if not all(torch.isfinite(each).all() for each in (error, *answers)):
        raise ConfigError(
            f"samples under a schedule that reuses {schedule.lazy_ratio:.0%}, or their gradients, are not finite; "
            "ask for less reuse, or run the model in a wider dtype"
        )
    size = error[0].numel() if by_sample else error.numel()
    squared = error.square().flatten(1).mean(1) if by_sample else error.square().mean().reshape(1)
    return Response(
        schedule,
        torch.cat(answers).cpu().numpy(),
        torch.cat(errors).double().cpu().numpy(),
        size,
        weight=np.tile(cauchy_weights(squared.double().cpu().numpy()), directions),
        timesteps=np.array([trace.timesteps[step] for step in sorted(trace.timesteps)]),
        sensitivity=trace.sensitivity / (directions * error.numel()),
    )


@dataclass
class _Stream:
    """For each branch of one stream what it computed at each step, and, still differentiable, its last computations:
    step and outputs."""

    caches: CacheState
    computed: dict[int, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    known: dict[int, tuple[tuple[int, tuple[Tensor, ...]], ...]] = field(default_factory=dict)
    latest: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass
class _Trace:
    """A differentiable trajectory under a schedule.

    Attributes:
        first: what the branches returned where nothing came before that can be differentiated.
        on_gradient: called with the gradient of each output on the way back:
            ``(stream, step, branch, output, gradient)``.
    """

    schedule: CacheSchedule
    streams: dict[int, _Stream] = field(default_factory=dict)
    axes: dict[int, list[int | None]] = field(default_factory=dict)
    first: list[Tensor] = field(default_factory=list)
    on_gradient: Callable[[_Stream, int, int, int, Tensor], None] | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    timesteps: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sensitivity: Floats = np.zeros(self.schedule.steps)

    def drive(self, call: ModelCall) -> Any:
        torch.set_grad_enabled(True)  # until the sampler's own torch.no_grad ends
        stream = self.streams.setdefault(id(call.caches), _Stream(call.caches))
        step = _TracedStep(self, stream, call.step, dict(stream.known))
        detached = replace(call, state=[value.detach() for value in call.state])
        self.timesteps[call.step] = call.timestep
        result = checkpoint(detached.run, step, use_reentrant=False, preserve_rng_state=False)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.hooks.append(leaf.register_hook(partial(self._feel_output, call.step)))
        return result

    def _feel_output(self, step: int, gradient: Tensor) -> None:
        if self.on_gradient is not None:
            self.sensitivity[step] += float(gradient.double().square().sum())

    def release(self) -> None:
        """Let go of the graph: it holds the steps to be repeated, which hold the streams, whose tensors hold the graph,
        and no garbage collector sees through it."""
        for hook in self.hooks:
            hook.remove()
        for stream in self.streams.values():
            stream.computed.clear()
            stream.known.clear()
            stream.latest.clear()
        self.streams.clear()
        self.first.clear()

    def rows_are_samples(self, samples: Tensor) -> bool:
        """Whether row r of every branch belongs to sample ``r % B``, seen from what reaches the first sample."""
        towards = torch.zeros_like(samples)
        towards[0] = 1.0
        latest = [
            (output, axis)
            for stream in self.streams.values()
            for branch, outputs in stream.latest.items()
            for output, axis in zip(outputs, self.axes[branch], strict=True)
        ]
        if any(axis is None or output.shape[axis] % len(samples) for output, axis in latest):
            return False
        gradients = torch.autograd.grad(
            samples, [output for output, _ in latest], towards, retain_graph=True, materialize_grads=True
        )
        rows = [gradient.movedim(axis or 0, 0) for gradient, (_, axis) in zip(gradients, latest, strict=True)]
        return not any(each.flatten(1).abs().sum(1).reshape(-1, len(samples))[:, 1:].any() for each in rows)

    def answer(self, samples: Tensor, direction: Tensor, by_sample: bool, keep: bool) -> Tensor:
        """``float32[B, T, G, MAX_AGE + 1]`` along one direction for each sample, or ``[1, ...]`` for all together."""
        count = len(samples) if by_sample else 1
        result = torch.zeros(count, self.schedule.steps, self.schedule.branches, MAX_AGE + 1)

        def on_gradient(stream: _Stream, step: int, branch: int, output: int, gradient: Tensor) -> None:
            axis = self.axes[branch][output] if by_sample else None
            for age in range(min(step, MAX_AGE) + 1):
                value = stream.computed[branch][step - age][output]
                result[:, step, branch, age] += _products(gradient, value, axis, count).cpu()

        self.on_gradient = on_gradient
        torch.autograd.grad(samples, self.first, direction, retain_graph=keep, allow_unused=True)
        self.on_gradient = None
        return result


@dataclass
class _TracedStep:
    """Returns what the schedule says, and computes beside it what was not asked for.

    It runs again when the way back comes to it, and then leaves no trace.
    """

    trace: _Trace
    stream: _Stream
    step: int
    known: dict[int, tuple[tuple[int, tuple[Tensor, ...]], ...]]
    traced: set[int] = field(default_factory=set)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index, schedule = branch.branch.index, self.trace.schedule
        known, fresh = self.known.get(index, ()), branch.compute(inputs)
        kept = branch.kept(inputs, fresh)
        if not known or schedule.should_compute[self.step, index]:
            known, returned = ((self.step, kept), *known[:1]), tuple(output.view_as(output) for output in fresh)
        else:
            slope = 1.0 if schedule.slopes is None else float(schedule.slopes[self.step, index])
            returned = branch.restored(inputs, self._reuse(known, slope))
        returned = tuple(value if value.requires_grad else value.detach().requires_grad_() for value in returned)
        if index not in self.traced:
            self.traced.add(index)
            self.trace.axes[index] = [output.batch_axis for output in branch.branch.outputs]
            self.stream.known[index], self.stream.latest[index] = known, returned
            self.stream.computed.setdefault(index, []).append(tuple(output.detach() for output in kept))
            for position, value in enumerate(returned):
                self.trace.hooks.append(value.register_hook(partial(self._note_gradient, index, position)))
            self.trace.first += [value for value in returned if value.is_leaf]
        return returned

    def _note_gradient(self, branch: int, output: int, gradient: Tensor) -> None:
        if self.trace.on_gradient is not None:
            self.trace.on_gradient(self.stream, self.step, branch, output, gradient)

    def _reuse(self, known: tuple[tuple[int, tuple[Tensor, ...]], ...], slope: float) -> tuple[Tensor, ...]:
        (at, values), *earlier = known
        if not earlier:
            return tuple(value.view_as(value) for value in values)
        before, previous = earlier[0]
        moved = slope * (self.step - at) / (at - before)
        return tuple(value + moved * (value - old) for value, old in zip(values, previous, strict=True))


def _products(left: Tensor, right: Tensor, axis: int | None, count: int) -> Tensor:
    """``float32[count]``: the inner products of each sample's rows, or of all."""
    if axis is None:
        return torch.dot(left.flatten().float(), right.flatten().float()).reshape(1)
    first, second = (tensor.movedim(axis, 0).flatten(1).float() for tensor in (left, right))
    return torch.einsum("rf,rf->r", first, second).reshape(-1, count).sum(0)
