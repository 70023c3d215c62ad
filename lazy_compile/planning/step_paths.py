"""Whole steps by what a dense trajectory alone tells: how well each output is extrapolated from those before.

The squared miss of an extrapolation is a quadratic form in the inner products of the model's outputs, so that T**2
numbers say what every choice of steps would miss. The misses of a choice are added up, each weighted by a power of
the steps that are still to come, since an early error travels further. The best choice is then a shortest path
(DPCache, arXiv 2602.22654; here costs depend on the last two computed steps, and need no calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.planning.replay import Trajectory
from lazy_compile.planning.whole_step_starts import Rule, Steps

Floats = npt.NDArray[np.float64]

POWERS = (0.0, 1.0, 2.0, 4.0)
"""Of the steps that are still to come."""


@dataclass(frozen=True)
class StepCosts:
    """``miss: float64[T, T, T]``: at ``[before, latest, step]`` the squared miss at a step that is extrapolated from
    the two steps computed last; ``before == latest`` where there is one, which is repeated."""

    miss: Floats

    @classmethod
    def of(cls, dense: Sequence[Trajectory], linear: bool, fitted: bool = False) -> StepCosts:
        """From dense trajectories; ``fitted`` follows the line as far as misses least, and not all the way."""
        inner: Floats = np.sum([_inner_products(each) for each in dense], axis=0)
        steps = len(inner)
        miss = np.zeros((steps, steps, steps))
        for latest in range(steps):
            for before in range(latest + 1):
                for step in range(latest + 1, steps):
                    apart = _apart(inner, latest, step, latest, step)
                    if linear and before < latest and (length := _apart(inner, before, latest, before, latest)) > 0:
                        along = _apart(inner, latest, step, before, latest)
                        slope = along / length if fitted else (step - latest) / (latest - before)
                        apart += slope * (slope * length - 2 * along)
                    miss[before, latest, step] = max(apart, 0.0)
        return cls(miss)

    @property
    def steps(self) -> int:
        return len(self.miss)

    @property
    def change(self) -> Floats:
        """``float64[T - 1]``: how much the model changes at every step after the first."""
        latest = np.arange(self.steps - 1)
        change: Floats = np.sqrt(self.miss[latest, latest, latest + 1])
        return change

    def cost(self, computes: Steps, power: float) -> float:
        """What a choice of whole steps misses, weighted."""
        before = latest = 0
        total, weight = 0.0, self._weights(power)
        for step in range(1, self.steps):
            if computes[step]:
                before, latest = latest, step
            else:
                total += weight[step] * self.miss[before, latest, step]
        return total

    def path(self, count: int, warmup_steps: int, power: float) -> Steps:
        """The ``count`` steps of least cost, the first ``warmup_steps`` among them."""
        steps = self.steps
        ahead = np.zeros((steps, steps, steps + 1))  # [before, latest, next]: cost of the steps between
        weighted = self.miss * self._weights(power)
        for latest in range(steps):
            ahead[:, latest, latest + 2 :] = np.cumsum(weighted[:, latest, latest + 1 :], axis=1)
        start = (max(warmup_steps - 2, 0), warmup_steps - 1)
        best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {start: (0.0, tuple(range(warmup_steps)))}
        for _ in range(count - warmup_steps):
            found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for (before, latest), (spent, chosen) in best.items():
                for following in range(latest + 1, steps):
                    total = spent + ahead[before, latest, following]
                    key = (latest, following)
                    if key not in found or total < found[key][0]:
                        found[key] = (total, (*chosen, following))
            best = found or best
        _, chosen = min(
            (spent + ahead[before, latest, steps], chosen) for (before, latest), (spent, chosen) in best.items()
        )
        computes = np.zeros(steps, dtype=bool)
        computes[list(chosen)] = True
        return computes

    def rules(self, warmup_steps: int) -> list[Rule]:
        """The shortest paths, see :mod:`lazy_compile.planning.whole_step_starts`."""
        return [lambda count, power=power: self.path(max(count, warmup_steps), warmup_steps, power) for power in POWERS]  # type: ignore[misc]

    def _weights(self, power: float) -> Floats:
        weights: Floats = ((self.steps - np.arange(self.steps)) / self.steps) ** power
        return weights


def _apart(inner: Floats, a: int, b: int, c: int, d: int) -> float:
    """The inner product of ``output[b] - output[a]`` and ``output[d] - output[c]``."""
    return float(inner[b, d] - inner[b, c] - inner[a, d] + inner[a, c])


def _inner_products(dense: Trajectory) -> Floats:
    """``float64[T, T]`` of the outputs of all calls of each step."""
    steps = max(dense.steps) + 1
    rows: list[list[Tensor]] = [[] for _ in range(steps)]
    for step, result in zip(dense.steps, dense.results, strict=True):
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        rows[step] += [leaf.flatten() for leaf in leaves]
    joined = [torch.cat(row).float() for row in rows]
    shared = min(map(len, joined))  # guidance may be off at some steps: its call comes second
    outputs = torch.stack([row[:shared] for row in joined])
    inner: Floats = (outputs @ outputs.T).double().cpu().numpy() / outputs.shape[1]
    return inner
