"""How far reuse should follow its line, for any choice of steps, from what one dense trajectory computed.

Reused is ``last + slope * (extrapolated - last)``. The slope that misses the true output least is that of linear
regression, a quotient of inner products of the outputs of one branch at different steps. So ``T**2`` numbers for each
branch give the slopes of every schedule, without another call of the model. They are taken from a few thousand
elements of each output, the same at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.runtime.cache import extrapolation_weights

Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.bool_]

ELEMENTS = 2**14
"""Of each output of a branch in one call that are looked at."""

LARGEST = 2.0
"""No slope is further from 0."""


@dataclass
class OutputSamples:
    """Some elements of what branches computed, by branch and step."""

    _rows: dict[int, dict[int, list[Tensor]]] = field(default_factory=dict)

    def add(self, step: int, computed: Mapping[int, Sequence[Tensor]]) -> None:
        """What the branches of one call computed; a step may have several calls."""
        for branch, outputs in computed.items():
            kept = [_some(output) for output in outputs if output.is_floating_point() or output.is_complex()]
            self._rows.setdefault(branch, {}).setdefault(step, []).extend(kept)

    def inner_products(self, branches: int, steps: int) -> Floats:
        """``float64[G, T, T]`` of the outputs of each branch; NaN where a branch did not compute."""
        result = np.full((branches, steps, steps), np.nan)
        for branch, rows in self._rows.items():
            joined = {step: torch.cat(parts) for step, parts in rows.items() if parts}
            if not joined:
                continue
            shared = min(map(len, joined.values()))  # guidance may be off at some steps: its call comes second
            outputs = torch.stack([each[:shared] for each in joined.values()]).double()
            result[np.ix_([branch], list(joined), list(joined))] = (outputs @ outputs.T).numpy()
        return result


@dataclass(frozen=True)
class SlopeFits:
    """
    Attributes:
        inner: ``float64[G, T, T]``, inner products of the outputs of each branch at two steps.
        order: of the extrapolation.
    """

    inner: Floats
    order: int

    def slopes(self, computes: Table) -> Floats:
        """``float64[T, G]`` for the reused entries of ``computes: bool[T, G]``; 1 elsewhere, and where nothing says
        better."""
        result = np.ones(computes.shape)
        columns, kinds = np.unique(computes, axis=1, return_inverse=True)
        for kind, column in enumerate(columns.T):
            branches = np.flatnonzero(kinds.reshape(-1) == kind)
            result[:, branches] = self._of_column(column, self.inner[branches])
        return result

    def _of_column(self, column: Table, inner: Floats) -> Floats:
        """``float64[T, K]`` of K branches that compute at the same steps."""
        steps = len(column)
        result = np.ones((steps, len(inner)))
        for step in np.flatnonzero(~column):
            latest, *before = np.flatnonzero(column[:step])[::-1][: self.order + 1]
            if not before:
                continue
            line, wanted = np.zeros(steps), np.zeros(steps)
            wanted[step], wanted[latest] = 1.0, -1.0
            weights = extrapolation_weights(np.array([step]), np.array([latest]), np.array(before)[:, None])[:, 0]
            line[before] = weights
            line[latest] = -weights.sum()
            used = np.flatnonzero((line != 0) | (wanted != 0))
            part = inner[:, used[:, None], used[None, :]]
            along, length = part @ line[used] @ wanted[used], part @ line[used] @ line[used]
            with np.errstate(divide="ignore", invalid="ignore"):
                fitted = np.clip(along / length, -LARGEST, LARGEST)
            result[step] = np.where(np.isfinite(fitted), fitted, 1.0)
        return result


def _some(output: Tensor) -> Tensor:
    """``float32[ELEMENTS]``, or all if there are fewer."""
    flat = (torch.view_as_real(output) if output.is_complex() else output).detach().flatten()
    if len(flat) > ELEMENTS:
        flat = flat[_places(len(flat)).to(flat.device)]
    return flat.to("cpu", torch.float32, copy=True)  # a runner writes to its buffers again


@lru_cache(maxsize=64)
def _places(size: int) -> Tensor:
    """Drawn, since a regular choice may always meet the same channel."""
    return torch.randint(size, (ELEMENTS,), generator=torch.Generator().manual_seed(0))
