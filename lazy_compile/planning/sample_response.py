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
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.errors import ConfigError
from lazy_compile.planning.output_store import Streaming
from lazy_compile.planning.trace import Trace, earlier_weights
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import DenseStep, Sampler, Samplers, parts_of, require_finite

Floats = npt.NDArray[np.float64]


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
        order: of the extrapolation.
    """

    schedule: CacheSchedule
    directional_derivatives: npt.NDArray[np.float32]
    error: Floats
    size: int
    weight: Floats | None = None
    order: int = 1
    timesteps: Floats | None = None
    sensitivity: Floats | None = None

    def of_single_reuses(self) -> Floats:
        """``float64[T, G]``: mean squared change of the final samples if one branch reuses at one step.

        Of an otherwise dense trajectory; NaN at step 0.
        """
        answer = self.directional_derivatives
        reused = answer[..., 1].astype(np.float64)
        for step in range(2, answer.shape[1]):
            computed = tuple(range(step - 1, max(step - 2 - self.order, -1), -1))
            for age, weight in enumerate(earlier_weights(step, computed), start=2):
                reused[:, step] += weight * (answer[:, step, :, age] - answer[:, step, :, 1])
        effect: Floats = np.square(reused - answer[..., 0]).mean(axis=0) / self.size
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
        return cls(responses[0].schedule, answer, error, responses[0].size, weight, responses[0].order)


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
    sample: Samplers,
    schedule: CacheSchedule,
    *,
    seed: int,
    directions: int = 1,
    rows_are_samples: bool | None = None,
    streaming: Streaming | None = None,
) -> Response:
    """Run one trajectory under ``schedule`` in which every branch also computes, and go back through it.

    Takes the time of ``2 + 3 * directions`` dense trajectories. Kept are the outputs of all branches at all steps,
    where ``streaming`` says; and of the other activations those of one call, which is repeated on the way back.

    Args:
        lazy, sample: what to run. Several samplers are measured one after the other; the result is that of one batch
            of all their samples, to rounding.
        schedule: what to run it under.
        seed: of the noise and the directions.
        directions: measured one after the other.
        rows_are_samples: whether samples are distinguished, as was found for this graph and sampler before; None
            finds out, by going back through the last step once more.
        streaming: where outputs are kept; None beside the model.

    Raises:
        NoGradientError: the sampler detaches its samples or runs in inference mode.
        ConfigError: samples or their gradients are not finite.
    """
    samplers = parts_of(sample)
    dense = [dense_samples(lazy, sampler, seed) for sampler in samplers]
    drawn = _directions(dense, seed, directions)
    parts: list[_Part] = []
    for sampler, expected, along in zip(samplers, dense, drawn, strict=True):
        part = _measure_part(lazy, sampler, schedule, seed, expected, along, rows_are_samples, streaming or Streaming())
        parts, rows_are_samples = [*parts, part], part.by_sample
    rows = sum(map(len, dense))
    by_sample = all(part.by_sample for part in parts)
    numbers = sum(part.numbers for part in parts)
    squared = np.concatenate([part.squared for part in parts])
    return Response(
        schedule,
        np.concatenate([part.answers[place] for place in range(directions) for part in parts]),
        np.concatenate([part.errors[place] for place in range(directions) for part in parts]),
        numbers // rows if by_sample else numbers // len(parts),
        weight=np.tile(cauchy_weights(squared), directions),
        order=lazy.lazy_config.values_kept - 1,
        timesteps=parts[0].timesteps,
        sensitivity=np.sum([part.sensitivity for part in parts], axis=0) / (directions * numbers),
    )


@dataclass(frozen=True)
class _Part:
    """What the samples of one sampler answer; arrays have a first axis of samples, or of 1 for all together.

    Attributes:
        answers, errors: for each direction, see :class:`Response`.
        squared: mean squared change.
        numbers: in all samples.
    """

    answers: list[npt.NDArray[np.float32]]
    errors: list[Floats]
    squared: Floats
    timesteps: Floats
    sensitivity: Floats
    numbers: int
    by_sample: bool


def _measure_part(
    lazy: LazyModule,
    sample: Sampler,
    schedule: CacheSchedule,
    seed: int,
    dense: Tensor,
    directions: Tensor,
    by_sample: bool | None,
    streaming: Streaming,
) -> _Part:
    with Trace(schedule, streaming, lazy.lazy_config.values_kept - 1) as trace:
        with torch.enable_grad(), lazy.call_handler(trace.drive):
            samples = sample(lazy, seed)
        if not samples.requires_grad:
            raise NoGradientError(
                "the samples carry no gradient; give a sampler that returns what its last step gives, and that does "
                "not detach it or run under torch.inference_mode (torch.no_grad is fine)"
            )
        error = (samples - dense).detach()
        if by_sample is None:
            by_sample = trace.rows_are_samples(samples)
        answers, errors = [], []
        for place, direction in enumerate(directions.to(error)):
            answers.append(trace.answer(samples, direction, by_sample, keep=place < len(directions) - 1))
            along = (direction * error).flatten(1).sum(1)
            errors.append(along if by_sample else along.sum(0, keepdim=True))
    if not all(torch.isfinite(each).all() for each in (error, *answers)):
        raise ConfigError(
            f"samples under a schedule that reuses {schedule.lazy_ratio:.0%}, or their gradients, are not finite; "
            "ask for less reuse, or run the model in a wider dtype"
        )
    squared = error.square().flatten(1).mean(1) if by_sample else error.square().mean().reshape(1)
    return _Part(
        [answer.cpu().numpy() for answer in answers],
        [each.double().cpu().numpy() for each in errors],
        squared.double().cpu().numpy(),
        np.array([trace.timesteps[step] for step in sorted(trace.timesteps)]),
        trace.sensitivity,
        error.numel(),
        by_sample,
    )


def _directions(dense: Sequence[Tensor], seed: int, directions: int) -> Sequence[Tensor]:
    """For each part ``float[directions, B, ...]``, the rows that they would have in one batch.

    Raises:
        ConfigError: samples of the parts have different sizes.
    """
    shapes = {samples.shape[1:] for samples in dense}
    if len(shapes) > 1:
        raise ConfigError(
            f"the samplers draw samples of {len(shapes)} sizes; plan for one size, or for each of them with one sampler"
        )
    generator, rows = torch.Generator().manual_seed(seed), [len(samples) for samples in dense]
    drawn = torch.stack(
        [torch.randn((sum(rows), *shapes.copy().pop()), generator=generator) for _ in range(directions)]
    )
    return torch.split(drawn, rows, dim=1)
