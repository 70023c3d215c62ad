"""Gates set to a target, and compared on noise that no table was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.calibration.initial_gates import MAX_MARGIN
from lazy_compile.errors import ConfigError
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.sample_response import dense_samples
from lazy_compile.planning.search import HELD_OUT_SEED_OFFSET, robust_losses
from lazy_compile.policies.gate_table import GateTable
from lazy_compile.policies.learned import Learned
from lazy_compile.processes import Processes
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MatchedGates:
    """A table set to the target, and what it then does on unseen noise.

    Attributes:
        errors: ``float64[S]``, mean squared change of each of the S samples.
    """

    table: GateTable
    lazy_ratio: float
    compute_ratio: float
    errors: Floats

    @property
    def error(self) -> float:
        """Root mean square change of the samples."""
        return float(self.errors.mean() ** 0.5)

    def clearly_beats(self, other: MatchedGates) -> bool:
        """Whether the samples change less, all together and one by one: in the mean of the losses that planning judges
        by, sample against sample, by more than the standard error of that mean."""
        mine, theirs = robust_losses(np.stack([self.errors, other.errors]))
        gain = theirs - mine
        uncertainty = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        return self.error < other.error and float(gain.mean()) > uncertainty


@dataclass(frozen=True)
class HeldOutComparison:
    """Runs tables on noise that lies far from that of planning and training.

    Attributes:
        seed: the first of planning and training.
    """

    lazy: LazyModule
    sample: Sampler
    budget: Budget
    seed: int
    on_progress: OnProgress

    def match_target(self, table: GateTable, enough: float = 0.0) -> MatchedGates:
        """Shift all biases alike until the target is met.

        Args:
            table: the gates; they stay as they are.
            enough: how far they may be beyond the target and still need no shift.
        """
        low, high = -2 * MAX_MARGIN, 2 * MAX_MARGIN
        shift, closest = 0.0, math.inf
        for trial in range(SHIFTS):
            shifted = table.shifted(shift)
            samples, lazy_ratio, compute_ratio = self._run(shifted, self._first_seed)
            excess = self._saved_beyond_target(lazy_ratio, compute_ratio)
            if abs(excess) < closest:
                closest, best = abs(excess), (shifted, lazy_ratio, compute_ratio)
            is_close = closest < TOLERANCE or (trial == 0 and 0 <= excess <= enough + ROUNDING)
            self.on_progress("setting the ratio", SHIFTS if is_close else trial + 1, SHIFTS)
            if is_close:
                break
            low, high = (shift, high) if excess > 0 else (low, shift)
            shift = (low + high) / 2
        return MatchedGates(*best, errors=self._errors(best[0], len(samples)))

    @property
    def _first_seed(self) -> int:
        return self.seed + HELD_OUT_SEED_OFFSET

    @cached_property
    def _dense(self) -> dict[int, Tensor]:
        """What every table is held against, for the seeds of this process."""
        seeds = Processes.beside(self.lazy.graph.collective_groups).share(
            range(self._first_seed, self._first_seed + COMPARED)
        )
        return {seed: dense_samples(self.lazy, self.sample, seed) for seed in seeds}

    def _errors(self, table: GateTable, batch: int) -> Floats:
        """``float64[COMPARED * batch]``: mean squared change of each sample under these gates."""
        errors = torch.zeros(COMPARED, batch, dtype=torch.float64)
        for seed, dense in self._dense.items():
            change = self._run(table, seed)[0].double() - dense.double()
            errors[seed - self._first_seed] = change.square().flatten(1).mean(1).cpu()
        errors = Processes.beside(self.lazy.graph.collective_groups).sum(errors)
        if not errors.isfinite().all():
            raise ConfigError(
                "samples under the gates are not finite, and those of the original are; ask for less reuse, "
                "or lower the learning rate"
            )
        return errors.flatten().numpy()

    def _saved_beyond_target(self, lazy_ratio: float, compute_ratio: float) -> float:
        if self.budget.lazy_ratio is not None:
            return lazy_ratio - self.budget.lazy_ratio
        assert self.budget.compute_ratio is not None
        return self.budget.compute_ratio - compute_ratio

    def _run(self, table: GateTable, seed: int) -> tuple[Tensor, float, float]:
        lazy = self.lazy
        policy, lazy.policy = lazy.policy, Learned(table)
        try:
            with torch.no_grad():
                samples = self.sample(lazy, seed)
            return samples, lazy.stats.lazy_ratio, lazy.stats.compute_ratio
        finally:
            lazy.policy = policy


COMPARED = 8
"""Unseen seeds that tables are compared on."""

SHIFTS = 12
"""Most trajectories that are run to set the ratio."""

TOLERANCE = 0.002
"""Distance from the target at which no other shift is tried."""

ROUNDING = 1e-9
"""Of ratios that are sums of many shares."""
