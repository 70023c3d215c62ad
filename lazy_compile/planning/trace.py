"""A differentiable trajectory under a schedule, in which every branch also computes what it does not return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.planning.output_store import OutputStore, Streaming
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.cache import CacheState, extrapolation_weights
from lazy_compile.runtime.module import ModelCall

Floats = npt.NDArray[np.float64]

MAX_AGE = 12
"""Steps that are looked back: an older output counts as one of this age."""

OnGradient = Callable[["_Stream", int, int, int, Tensor], None]
"""Called with the gradient of an output: ``(stream, step, branch, output, gradient)``."""

Computed = tuple[int, tuple[Tensor, ...], tuple[int, ...]]
"""A computation that is reused: its step, stand-ins of what a cache keeps of its outputs, which carry the gradients,
and the numbers of these in the store."""


@cache
def earlier_weights(step: int, computed: tuple[int, ...]) -> tuple[float, ...]:
    """How much of each value that was computed before the last, less the last, is followed at a step."""
    at, *before = computed
    weights = extrapolation_weights(np.array([step]), np.array([at]), np.array(before, dtype=np.int64).reshape(-1, 1))
    return tuple(weights[:, 0].tolist())


@dataclass
class _Stream:
    """For each branch of one stream the numbers in the store of what it computed, by step, its last computations, and
    the step at which it last returned something. A stream may begin late, as that of a guidance does, and be left out
    at a step.

    Attributes:
        anchors: for each step a scalar that all that is returned there depends on. A way back ends at these, so that no
            output need be kept for it.
    """

    caches: CacheState
    computed: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    known: dict[int, tuple[Computed, ...]] = field(default_factory=dict)
    latest: dict[int, int] = field(default_factory=dict)
    anchors: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Trace:
    """The way through a trajectory, and back; a context that lets go of what it keeps.

    Attributes:
        order: of the extrapolation.
        on_gradient: called with the gradient of each output on the way back.
    """

    schedule: CacheSchedule
    streaming: Streaming = field(default_factory=Streaming)
    order: int = 1
    streams: dict[int, _Stream] = field(default_factory=dict)
    axes: dict[int, list[int | None]] = field(default_factory=dict)
    on_gradient: OnGradient | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    timesteps: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sensitivity: Floats = np.zeros(self.schedule.steps)
        self.store = OutputStore(self.streaming)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the graph: it holds the steps to be repeated, which hold the streams, whose tensors hold the graph,
        and no garbage collector sees through it."""
        for hook in self.hooks:
            hook.remove()
        for stream in self.streams.values():
            stream.computed.clear()
            stream.known.clear()
            stream.anchors.clear()
        self.streams.clear()
        self.store.close()

    def drive(self, call: ModelCall) -> Any:
        torch.set_grad_enabled(True)  # until the sampler's own torch.no_grad ends
        stream = self.streams.setdefault(id(call.caches), _Stream(call.caches))
        anchor = torch.zeros((), device=call.tensors[0].device, requires_grad=True)
        stream.anchors[call.step] = anchor
        step = _TracedStep(self, stream, call.step, dict(stream.known), anchor)
        detached = replace(call, state=[value.detach() for value in call.state])
        self.timesteps[call.step] = call.timestep
        result = checkpoint(detached.run, step, use_reentrant=False, preserve_rng_state=False)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.hooks.append(leaf.register_hook(partial(self._feel_output, call.step)))
        return result

    def _feel_output(self, step: int, gradient: Tensor) -> None:
        if self.on_gradient is not None and step < self.schedule.steps:
            self.sensitivity[step] += float(gradient.double().square().sum())

    def rows_are_samples(self, samples: Tensor) -> bool:
        """Whether row r of every branch belongs to sample ``r % B``, seen from what reaches the first sample."""
        if any(axis is None for axes in self.axes.values() for axis in axes):
            return False
        mixed = False

        def on_gradient(stream: _Stream, step: int, branch: int, output: int, gradient: Tensor) -> None:
            nonlocal mixed
            if mixed or step != stream.latest[branch]:
                return
            rows = gradient.movedim(self.axes[branch][output] or 0, 0).flatten(1).abs().sum(1)
            mixed = len(rows) % len(samples) > 0 or bool(rows.reshape(-1, len(samples))[:, 1:].any())

        towards = torch.zeros_like(samples)
        towards[0] = 1.0
        steps = [(stream, step) for stream in self.streams.values() for step in set(stream.latest.values())]
        self._go_back(samples, [stream.anchors[step] for stream, step in steps], towards, on_gradient, keep=True)
        return not mixed

    def answer(self, samples: Tensor, direction: Tensor, by_sample: bool, keep: bool) -> Tensor:
        """``float32[B, T, G, MAX_AGE + 1]`` along one direction for each sample, or ``[1, ...]`` for all together."""
        count = len(samples) if by_sample else 1
        result = torch.zeros(count, self.schedule.steps, self.schedule.branches, MAX_AGE + 1)

        def on_gradient(stream: _Stream, step: int, branch: int, output: int, gradient: Tensor) -> None:
            if step >= self.schedule.steps:
                return
            axis = self.axes[branch][output] if by_sample else None
            computed = stream.computed[branch]
            for age in range(min(step, MAX_AGE) + 1):
                value = self.store.get(computed.get(step - age, computed[step])[output])  # nothing cached: it computes
                result[:, step, branch, age] += _products(gradient, value, axis, count).cpu()

        anchors = [anchor for stream in self.streams.values() for anchor in stream.anchors.values()]
        self._go_back(samples, anchors, direction, on_gradient, keep)
        return result

    def _go_back(
        self, samples: Tensor, to: Sequence[Tensor], along: Tensor, on_gradient: OnGradient, keep: bool
    ) -> None:
        self.on_gradient = on_gradient
        try:
            torch.autograd.grad(samples, to, along, retain_graph=keep, allow_unused=True)
        finally:
            self.on_gradient = None


@dataclass
class _TracedStep:
    """Returns what the schedule says, and computes beside it what was not asked for.

    It runs again when the way back comes to it, and then leaves no trace.
    """

    trace: Trace
    stream: _Stream
    step: int
    known: dict[int, tuple[Computed, ...]]
    anchor: Tensor
    traced: set[int] = field(default_factory=set)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index, schedule = branch.branch.index, self.trace.schedule
        again, known = index in self.traced, self.known.get(index, ())
        if not known or self.step >= schedule.steps or schedule.should_compute[self.step, index]:
            returned = self._compute(branch, inputs)
            if not again:
                kept = branch.kept(inputs, returned)
                self._note(branch, numbers := self._keep(kept))
                latest = (self.step, tuple(stand_in(value) for value in kept), numbers)
                self.stream.known[index] = (latest, *known[: self.trace.order])
        else:
            if not again:  # only its values are asked for
                with torch.no_grad():
                    self._note(branch, self._keep(branch.kept(inputs, branch.compute(inputs))))
            slope = 1.0 if schedule.slopes is None else float(schedule.slopes[self.step, index])
            returned = branch.restored(inputs, self._reuse(known, slope))
        returned = tuple(_Anchored.apply(value, self.anchor) for value in returned)  # type: ignore[no-untyped-call]
        if not again:
            self.traced.add(index)
            self.stream.latest[index] = self.step
            for position, value in enumerate(returned):
                self.trace.hooks.append(value.register_hook(partial(self._note_gradient, index, position)))
        return returned

    def _compute(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        if not self.trace.streaming.repeat_branches:
            return branch.compute(inputs)

        def compute(*given: Any) -> tuple[Tensor, ...]:
            return branch.compute(given)

        # one by one: tensors in a list would be kept until the way back, those of all steps
        result: tuple[Tensor, ...] = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return result

    def _keep(self, outputs: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(self.trace.store.put(output) for output in outputs)

    def _note(self, branch: LazyBranch, numbers: tuple[int, ...]) -> None:
        self.trace.axes[branch.branch.index] = [output.batch_axis for output in branch.branch.outputs]
        self.stream.computed.setdefault(branch.branch.index, {})[self.step] = numbers

    def _note_gradient(self, branch: int, output: int, gradient: Tensor) -> None:
        if self.trace.on_gradient is not None:
            self.trace.on_gradient(self.stream, self.step, branch, output, gradient)

    def _reuse(self, known: tuple[Computed, ...], slope: float) -> tuple[Tensor, ...]:
        values = [self._values(each) for each in known]
        if len(known) == 1:
            return values[0]
        weights = earlier_weights(self.step, tuple(step for step, *_ in known))
        latest, *earlier = values
        return tuple(
            value + sum(slope * weight * (old - value) for weight, old in zip(weights, before, strict=True))
            for value, *before in zip(latest, *earlier, strict=True)
        )

    def _values(self, computed: Computed) -> tuple[Tensor, ...]:
        _, stand_ins, numbers = computed
        return tuple(value_of(each, self.trace.store, number) for each, number in zip(stand_ins, numbers, strict=True))


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor without memory that takes gradients for another one."""
    result: Tensor = _StandIn.apply(tensor)  # type: ignore[no-untyped-call]
    return result


def value_of(stand_in: Tensor, store: OutputStore, number: int) -> Tensor:
    """The values of a tensor in a store, whose gradients go to its stand-in."""
    result: Tensor = _Value.apply(stand_in, store, number)  # type: ignore[no-untyped-call]
    return result


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(()).expand(tensor.shape)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Anchored(torch.autograd.Function):
    """A value that depends on a scalar too, which it is not changed by."""

    @staticmethod
    def forward(context: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros((), dtype=torch.float32)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, stand_in: Tensor, store: OutputStore, number: int) -> Tensor:
        return store.get(number).view(stand_in.shape)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _products(left: Tensor, right: Tensor, axis: int | None, count: int) -> Tensor:
    """``float32[count]``: the inner products of each sample's rows, or of all."""
    if axis is None:
        return torch.dot(left.flatten().float(), right.flatten().float()).reshape(1)
    first, second = (tensor.movedim(axis, 0).flatten(1).float() for tensor in (left, right))
    return torch.einsum("rf,rf->r", first, second).reshape(-1, count).sum(0)
