"""Fixed tables of decisions: which branch computes at which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.storage import load_json

BoolTable = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StepTable:
    """What a policy decides by the index of a step alone, for any number of steps.

    Attributes:
        schedule: the first steps.
        repeats_from: the step from which on the rows are repeated without end; None: beyond the end all compute.
    """

    schedule: CacheSchedule
    repeats_from: int | None = None

    def behind(self, step: int) -> BoolTable:
        """``bool[N, branches]``: all rows that steps after this one can have."""
        table = self.schedule.should_compute
        repeated = table[len(table) if self.repeats_from is None else self.repeats_from :]
        return np.concatenate([table[step + 1 :], repeated])


@dataclass(frozen=True, eq=False)
class CacheSchedule:
    """``should_compute[step, branch]``: True computes, False reuses (as SmoothCache and cache-dit write it).

    ``slopes[step, branch]`` says how far linear reuse follows the line through the last two computed outputs: 1 all the
    way, 0 not at all. None stands for 1 everywhere.

    Raises:
        ConfigError: the table is not two-dimensional, its first step does not compute everything, or the slopes are not
            finite numbers, one for each decision.
    """

    should_compute: BoolTable
    slopes: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        table = np.array(self.should_compute, dtype=bool)
        if table.ndim != 2 or 0 in table.shape:
            raise ConfigError(f"a schedule is a table [steps, branches]; this one has shape {table.shape}")
        if not table[0].all():
            raise ConfigError("the first step of a schedule must compute every branch, since no cache exists before it")
        table.flags.writeable = False
        object.__setattr__(self, "should_compute", table)
        if self.slopes is not None:
            slopes = np.array(self.slopes, dtype=np.float64)
            if slopes.shape != table.shape or not np.isfinite(slopes).all():
                raise ConfigError(
                    f"slopes of shape {slopes.shape} do not fit a schedule of shape {table.shape}; "
                    "give one finite number for each decision"
                )
            slopes.flags.writeable = False
            object.__setattr__(self, "slopes", slopes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CacheSchedule) or (self.slopes is None) != (other.slopes is None):
            return False
        same_slopes = self.slopes is None or np.array_equal(self.slopes, other.slopes)  # type: ignore[arg-type]
        return same_slopes and np.array_equal(self.should_compute, other.should_compute)

    @property
    def steps(self) -> int:
        return int(self.should_compute.shape[0])

    @property
    def branches(self) -> int:
        return int(self.should_compute.shape[1])

    @property
    def lazy_ratio(self) -> float:
        """Share of branch evaluations that are reused."""
        return float(1.0 - self.should_compute.mean())

    def tied(self, leaders: Sequence[int]) -> CacheSchedule:
        """The same table with every branch doing as its leader.

        Args:
            leaders: see :func:`lazy_compile.policies.gate_layout.leaders_of`.
        """
        return self.of(leaders)

    def of(self, branches: Sequence[int]) -> CacheSchedule:
        """The columns of these branches, in this order."""
        slopes = None if self.slopes is None else self.slopes[:, list(branches)]
        return CacheSchedule(self.should_compute[:, list(branches)], slopes)

    def compute_ratio(self, branch_macs: Sequence[int], total_macs: int) -> float:
        """MACs spent over the MACs of the dense model, always-on parts included."""
        weights = np.asarray(branch_macs, dtype=np.float64)
        saved = (~self.should_compute * weights).sum() / self.steps
        return float(1.0 - saved / total_macs)

    @classmethod
    def always_compute(cls, steps: int, branches: int) -> CacheSchedule:
        return cls(np.ones((steps, branches), dtype=bool))

    @classmethod
    def every(cls, n: int, steps: int, branches: int) -> CacheSchedule:
        """All branches compute at every ``n``-th step and reuse between (FORA, arXiv 2407.01425)."""
        if n < 1:
            raise ConfigError(f"n is {n}; use 1 to compute at every step, 2 at every second one")
        computes = np.arange(steps) % n == 0
        return cls(np.repeat(computes[:, None], branches, axis=1))

    @classmethod
    def evenly(cls, count: int, steps: int, branches: int) -> CacheSchedule:
        """All branches compute at ``count`` steps, the first among them, as evenly spread as can be."""
        if not 1 <= count <= steps:
            raise ConfigError(f"count is {count}; of {steps} steps at least the first computes, and at most all")
        table = np.zeros((steps, branches), dtype=bool)
        table[np.arange(count) * steps // count] = True
        return cls(table)

    @classmethod
    def random(cls, lazy_ratio: float, steps: int, branches: int, seed: int) -> CacheSchedule:
        """Reuse drawn uniformly after the first step, with exactly the asked share where it can be reached."""
        if not 0.0 <= lazy_ratio <= 1.0:
            raise ConfigError(f"lazy_ratio is {lazy_ratio}; it is a share between 0 and 1")
        wanted = min(round(lazy_ratio * steps * branches), (steps - 1) * branches)
        reused = np.random.default_rng(seed).permutation((steps - 1) * branches)[:wanted]
        table = np.ones(steps * branches, dtype=bool)
        table[branches + reused] = False
        return cls(table.reshape(steps, branches))

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "branches": self.branches,
            "should_compute": self.should_compute.astype(int).tolist(),
            "slopes": None if self.slopes is None else self.slopes.tolist(),
        }

    @classmethod
    def from_json(cls, values: Any) -> CacheSchedule:
        try:
            table = np.asarray(values["should_compute"])
            if not np.isin(table, (0, 1)).all():
                raise ValueError("a decision is neither 0 nor 1")
            slopes = values.get("slopes")
            return cls(table, None if slopes is None else np.asarray(slopes, dtype=np.float64))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
            raise ArtifactError(
                f"this is not a schedule ({one_line(repr(error))}); expected a JSON object with "
                "should_compute[step][branch]"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> CacheSchedule:
        return cls.from_json(load_json(path))
