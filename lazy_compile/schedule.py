"""Fixed tables of decisions: which branch computes at which step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ArtifactError, ConfigError

BoolTable = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class CacheSchedule:
    """``should_compute[step, branch]``: True computes, False reuses (as SmoothCache and cache-dit write it).

    Raises:
        ConfigError: the table is not two-dimensional, or its first step does not compute everything.
    """

    should_compute: BoolTable

    def __post_init__(self) -> None:
        table = np.array(self.should_compute, dtype=bool)
        if table.ndim != 2 or 0 in table.shape:
            raise ConfigError(f"a schedule is a table [steps, branches]; this one has shape {table.shape}")
        if not table[0].all():
            raise ConfigError("the first step of a schedule must compute every branch, since no cache exists before it")
        table.flags.writeable = False
        object.__setattr__(self, "should_compute", table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheSchedule) and np.array_equal(self.should_compute, other.should_compute)

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
        """The same table with every branch doing as its leader, see :func:`lazy_compile.grouping.leaders_of`."""
        return CacheSchedule(self.should_compute[:, list(leaders)])

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
        }

    @classmethod
    def from_json(cls, values: Any) -> CacheSchedule:
        try:
            table = np.asarray(values["should_compute"])
            if not np.isin(table, (0, 1)).all():
                raise ValueError("a decision is neither 0 nor 1")
            return cls(table)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"this is not a schedule ({error!r}); expected a JSON object with should_compute[step][branch]"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> CacheSchedule:
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read the schedule {path}: {error}") from error
