"""Where the time of a step goes: the seconds of every branch, for budgets that are meant as latency."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.sampling import Sampler
from lazy_compile.storage import load_json

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BranchTimings:
    """What computing takes on the runtime that a plan is for.

    Attributes:
        branches: ``float64[G]``, seconds that reusing a branch saves.
        total: seconds of a dense step.

    Raises:
        ConfigError: a time is negative, or the branches take longer than the step.
    """

    branches: Floats
    total: float

    def __post_init__(self) -> None:
        if self.branches.ndim != 1 or not math.isfinite(self.total):
            raise ConfigError(
                f"branches of shape {self.branches.shape} and a step of {self.total} s are no timings; give a list of "
                "seconds, and the seconds of the whole step"
            )
        if not (np.isfinite(self.branches).all() and (self.branches >= 0).all() and self.branches.sum() <= self.total):
            raise ConfigError(
                f"branches of {self.branches.sum():.3g} s do not fit in a step of {self.total:.3g} s; give the seconds "
                "that each branch takes, none below 0, and those of the whole step"
            )

    @property
    def as_array(self) -> Floats:
        """``float64[G + 1]``: the branches, and the step."""
        return np.append(self.branches, self.total)

    @classmethod
    def load(cls, path: str | Path) -> BranchTimings:
        """Read ``{"branches": [seconds, ...], "total": seconds}``, measured on whatever runtime.

        Raises:
            ArtifactError: the file is missing or holds something else.
        """
        values = load_json(Path(path))
        try:
            return cls(np.array(values["branches"], dtype=np.float64), float(values["total"]))
        except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
            raise ArtifactError(
                f"{path} holds no timings ({one_line(repr(error))}); "
                'expected {"branches": [seconds, ...], "total": seconds}'
            ) from error


def measure_timings(lazy: LazyModule, sample: Sampler, *, seed: int = 0) -> BranchTimings:
    """Time one dense trajectory in PyTorch: the median over its steps, for each branch and in all."""
    watch = _Watch()

    def drive(call: ModelCall) -> Any:
        watch.branches.append({})
        with watch.measuring(watch.steps):
            return call.run(watch)

    with torch.no_grad(), lazy.call_handler(drive):
        sample(lazy, seed)
    columns = [[step[index] for step in watch.branches] for index in range(len(lazy.branches))]
    return BranchTimings(np.array([np.median(column) for column in columns]), float(np.median(watch.steps)))


@dataclass
class _Watch:
    """Every branch computes while the clock runs; implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`."""

    branches: list[dict[int, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        seconds: list[float] = []
        with self.measuring(seconds):
            outputs = branch.compute(inputs)
        self.branches[-1][branch.branch.index] = seconds[0]
        return outputs

    def measuring(self, into: list[float]) -> _Clock:
        return _Clock(into)


@dataclass
class _Clock:
    into: list[float]
    started: float = 0.0

    def __enter__(self) -> None:
        _wait_for_device()
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _wait_for_device()
        self.into.append(time.perf_counter() - self.started)


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
