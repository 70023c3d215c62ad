"""The learned predictor: pooled activations in, one compute logit per sample out (LazyDiT, arXiv 2412.12444, eq. 5).

The paper sums over the tokens; the mean used here makes a gate independent of the resolution. Its reuse score is
``s = sigmoid(-compute_logit)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lazy_compile.errors import ConfigError, shown
from lazy_compile.ir.branch import ResidualBranch

Interpolation = Literal["nearest", "linear"]

TINY = 1e-9
"""A distance between timesteps that is none."""

FORCE = 1.0e6
"""Added to a bias it computes, subtracted it reuses, whatever the gate reads."""


def pool_entry(entry: Tensor, batch_axis: int | None, channel_axis: int) -> Tensor:
    """Mean over everything but rows and channels, in fp32: ``float[B, C]`` (``float[1, C]`` without a batch axis)."""
    channel_axis %= entry.dim()
    keep = [channel_axis] if batch_axis is None else [batch_axis, channel_axis]
    pooled = entry.float().permute(*keep, *(axis for axis in range(entry.dim()) if axis not in keep))
    if batch_axis is None:
        pooled = pooled.unsqueeze(0)
    return pooled.flatten(2).mean(2) if pooled.dim() > 2 else pooled


def pool(branch: ResidualBranch, entries: Sequence[Tensor]) -> Tensor:
    """What a gate reads, ``float32[B, gate_features]``: the pooled entries, concatenated."""
    return torch.cat(
        [
            pool_entry(entry, spec.batch_axis if branch.row_separable else None, spec.channel_axis)
            for entry, spec in zip(entries, branch.entries, strict=True)
        ],
        dim=1,
    )


def compute_logit(branch: ResidualBranch, entries: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """``mean_over_tokens(entries) . weight + bias``.

    Args:
        branch: says which axes of the entries are rows and channels.
        entries: the branch's modulated inputs, each ``[B, ..., C]``.
        weight: ``float[gate_features]``.
        bias: ``float[]``.

    Returns:
        ``float32[B]``, or ``float32[1]`` for a branch whose rows cannot be separated.
    """
    pooled = pool(branch, entries)
    return pooled @ weight.to(pooled) + bias.to(pooled)


def should_compute(logit: Tensor) -> Tensor:
    """``bool``, same shape. A NaN computes."""
    return ~(logit <= 0)


@dataclass(frozen=True)
class GateRow:
    """The gates of one denoising step: ``weight: float32[sum of gate_features]``, ``bias: float32[G]``."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class GateTable:
    """Gate weights over the denoising trajectory: data, never graph structure.

    Attributes:
        features: gate_features of each of the G branches.
        knots: ``float64[K]``, the model's time input at each row, in denoising order.
        weight: ``float32[K, sum(features)]``.
        bias: ``float32[K, G]``.
        slope: ``float32[K, G]``, how far linear reuse follows its line; None: all the way.
        trajectory: ``int64[K]``, which trajectory each row belongs to, see :meth:`joined`; None: all to one.
        interpolation: ``"nearest"`` takes the row of the closest knot (one row per calibrated step, as in the paper);
            ``"linear"`` interpolates between knots, so that another number of steps finds its own values.
    """

    features: tuple[int, ...]
    knots: Tensor
    weight: Tensor
    bias: Tensor
    interpolation: Interpolation = "nearest"
    slope: Tensor | None = None
    trajectory: Tensor | None = None

    def __post_init__(self) -> None:
        expected_weight, expected_bias = (len(self.knots), sum(self.features)), (len(self.knots), len(self.features))
        if tuple(self.weight.shape) != expected_weight or tuple(self.bias.shape) != expected_bias:
            raise ConfigError(
                f"a gate table for {len(self.features)} branches and {len(self.knots)} knots has weight "
                f"{list(expected_weight)} and bias {list(expected_bias)}; "
                f"seen {list(self.weight.shape)} and {list(self.bias.shape)}"
            )
        if self.slope is not None and self.slope.shape != self.bias.shape:
            raise ConfigError(
                f"a gate table has one slope for each bias; seen {list(self.slope.shape)} for {list(self.bias.shape)}"
            )
        if not len(self.knots):
            raise ConfigError("a gate table needs at least one knot; give the timesteps that its rows belong to")
        if self.interpolation not in ("nearest", "linear"):
            raise ConfigError(f"interpolation is {shown(self.interpolation)}; expected 'nearest' or 'linear'")
        if self.trajectory is not None and (
            self.trajectory.shape != self.knots.shape or self.interpolation != "nearest"
        ):
            raise ConfigError(
                f"a gate table of several trajectories says which one each of its {len(self.knots)} knots belongs to, "
                f"and takes the nearest; seen {list(self.trajectory.shape)} and {shown(self.interpolation)}"
            )

    @classmethod
    def constant(cls, branches: Sequence[ResidualBranch], knots: Tensor, bias: float = 0.0) -> GateTable:
        """Gates that ignore their input: zero weights and one bias everywhere."""
        features = tuple(branch.gate_features for branch in branches)
        return cls(
            features,
            knots.to(torch.float64),
            torch.zeros(len(knots), sum(features)),
            torch.full((len(knots), len(features)), bias),
        )

    @classmethod
    def joined(cls, tables: Sequence[GateTable]) -> GateTable:
        """One table for trajectories of several numbers of steps, or samplers; each follows its own rows.

        Args:
            tables: of one model, each with a row for every step of its trajectory.

        Raises:
            ConfigError: the tables are of different models, or interpolate between knots.
        """
        first = tables[0]
        if any(table.features != first.features for table in tables):
            raise ConfigError("gate tables of different models cannot be joined; calibrate one model")
        if any(table.interpolation != "nearest" or table.trajectory is not None for table in tables):
            raise ConfigError("gate tables that are joined have a row for each step; calibrate without knots")
        slopes = [torch.ones_like(table.bias) if table.slope is None else table.slope for table in tables]
        return cls(
            first.features,
            torch.cat([table.knots for table in tables]),
            torch.cat([table.weight for table in tables]),
            torch.cat([table.bias for table in tables]),
            slope=None if all(table.slope is None for table in tables) else torch.cat(slopes),
            trajectory=torch.cat([torch.full((len(table.knots),), index) for index, table in enumerate(tables)]),
        )

    def row(self, timestep: float, before: float | None = None) -> GateRow:
        """The gates at one value of the model's time input; outside the knots, those of the nearest.

        Args:
            timestep: the time input of this step.
            before: that of the step before, by which several trajectories are distinguished.
        """
        lower, upper, fraction = self.locate(timestep, before)
        return GateRow(
            torch.lerp(self.weight[lower], self.weight[upper], fraction),
            torch.lerp(self.bias[lower], self.bias[upper], fraction),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file of gates holds, by name."""
        named = {name: getattr(self, name) for name in ("knots", "weight", "bias", "slope", "trajectory")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def slopes(self, timestep: float, before: float | None = None) -> list[float] | None:
        """Of every branch at one value of the time input, see :meth:`row`; None where the table has none."""
        if self.slope is None:
            return None
        lower, upper, fraction = self.locate(timestep, before)
        return torch.lerp(self.slope[lower], self.slope[upper], fraction).tolist()

    def locate(self, timestep: float, before: float | None = None) -> tuple[int, int, float]:
        """Rows ``lower`` and ``upper`` around a timestep, and how far it lies from the first to the second."""
        if self.interpolation == "linear":
            apart = self.knots - timestep
            between = (apart[:-1] * apart[1:] < 0).nonzero()
            if len(between):
                lower = int(between[0])
                return lower, lower + 1, float(apart[lower] / (apart[lower] - apart[lower + 1]))
        nearest = int(self._distances(timestep, before).argmin())
        return nearest, nearest, 0.0

    def is_foreign(self, timestep: float, before: float) -> bool:
        """Whether rows for single steps were calibrated on other timesteps than these, by half a step or more."""
        if self.interpolation == "linear" or len(self.knots) < 2:
            return False
        distances = self._apart(timestep) + self._apart(before, self._previous)
        nearest = int(distances.argmin())
        step = abs(float(self.knots[nearest] - self._previous[nearest]))
        return float(distances[nearest]) > max(step, TINY) / 2

    def _distances(self, timestep: float, before: float | None) -> Tensor:
        """``float64[K]``: how far each row is from this step, and, of several trajectories, from the one before."""
        if self.trajectory is None or before is None:
            return self._apart(timestep)
        return self._apart(timestep) + self._apart(before, self._previous)

    def _apart(self, timestep: float, knots: Tensor | None = None) -> Tensor:
        return ((self.knots if knots is None else knots) - timestep).abs()

    @cached_property
    def _previous(self) -> Tensor:
        """``float64[K]``: the time input one step before each row; of a first row its own."""
        previous = self.knots.roll(1)
        first = torch.zeros(len(self.knots), dtype=torch.bool)
        first[0] = True
        if self.trajectory is not None:
            first[1:] = self.trajectory.diff() != 0
        return torch.where(first, self.knots, previous)

    def shifted(self, amount: float) -> GateTable:
        """The same gates with ``amount`` added to every bias: positive computes more, negative reuses more."""
        return replace(self, bias=self.bias + amount)
