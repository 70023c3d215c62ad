"""What was reused, by step and branch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.bool_]


_RECORDING = threading.Lock()
"""Threads that run one model share its statistics."""


def _renew_lock() -> None:
    global _RECORDING
    _RECORDING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass
class LazyStats:
    """What was saved since the last reset of the statistics.

    Attributes:
        reused: ``float64[steps, branches]``, rows that reused.
        evaluated: ``float64[steps, branches]``, rows that were asked.
        calls: how often the model ran.
        captures: how many graphs were captured.
    """

    branch_macs: npt.NDArray[np.float64]
    total_macs: int
    reused: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    evaluated: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    mixed: int = 0
    decided: int = 0
    calls: int = 0
    captures: int = 0

    @property
    def lazy_ratio(self) -> float:
        """Reused over all branch evaluations, rows counted singly."""
        return float(self._reused_share.mean())

    @property
    def compute_ratio(self) -> float:
        """MACs spent over the MACs of the dense model, always-on parts included."""
        return float(1.0 - (self._reused_share * self.branch_macs).sum() / self.total_macs)

    @property
    def _reused_share(self) -> npt.NDArray[np.float64]:
        width = len(self.branch_macs)
        asked = self.evaluated.reshape(-1, width).sum(axis=0)
        reused = self.reused.reshape(-1, width).sum(axis=0)
        share: npt.NDArray[np.float64] = np.divide(reused, asked, out=np.zeros(width), where=asked > 0)
        return share

    @property
    def reuse_table(self) -> npt.NDArray[np.float64]:
        """``float64[steps, branches]``: the share of rows that reused."""
        return np.divide(self.reused, self.evaluated, out=np.zeros_like(self.reused), where=self.evaluated > 0)

    @property
    def decisions_varying_between_samples(self) -> float:
        """Share of the decisions after the first step in which some rows of a batch computed and others reused."""
        return self.mixed / self.decided if self.decided else 0.0

    def record(self, step: int, branch: int, computes: Rows) -> None:
        """Count the decisions of the rows of one branch at one step."""
        self.record_call([(step, branch, computes)])

    def record_step(self, step: int, computes: Rows, rows: npt.NDArray[np.float64]) -> None:
        """Count a call whose rows did alike: ``computes: bool[branches]``, and the rows of each branch."""
        with _RECORDING:
            self._extend(step)
            self.evaluated[step] += rows
            self.reused[step] += np.where(computes, 0.0, rows)
            self.decided += len(rows) if step > 0 else 0

    def record_call(self, decisions: Iterable[tuple[int, int, Rows]]) -> None:
        """Count all decisions of a call: ``(step, branch, bool[rows])`` each."""
        with _RECORDING:
            for decision in decisions:
                self._record(*decision)

    def _extend(self, step: int) -> None:
        if step >= len(self.reused):
            missing = ((0, step + 1 - len(self.reused)), (0, 0))
            width = len(self.branch_macs)
            self.reused = np.pad(self.reused.reshape(-1, width), missing)
            self.evaluated = np.pad(self.evaluated.reshape(-1, width), missing)

    def _record(self, step: int, branch: int, computes: Rows) -> None:
        self._extend(step)
        computing = int(computes.sum())
        self.evaluated[step, branch] += len(computes)
        self.reused[step, branch] += len(computes) - computing
        if step > 0:
            self.decided += 1
            self.mixed += 0 < computing < len(computes)
