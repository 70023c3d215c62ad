"""The learned predictor: pooled activations in, one compute logit per sample out (LazyDiT, arXiv 2412.12444, eq. 5).

The paper sums over the tokens; the mean used here makes a gate independent of the resolution. Its reuse score is
``s = sigmoid(-compute_logit)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lazy_compile.branch import ResidualBranch
from lazy_compile.errors import ConfigError

Interpolation = Literal["nearest", "linear"]

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
        interpolation: ``"nearest"`` takes the row of the closest knot (one row per calibrated step, as in the paper);
            ``"linear"`` interpolates between knots, so that another number of steps finds its own values.
    """

    features: tuple[int, ...]
    knots: Tensor
    weight: Tensor
    bias: Tensor
    interpolation: Interpolation = "nearest"
    slope: Tensor | None = None

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
            raise ConfigError(f"interpolation is {self.interpolation!r}; expected 'nearest' or 'linear'")

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

    def row(self, timestep: float) -> GateRow:
        """The gates at one value of the model's time input; outside the knots, those of the nearest."""
        lower, upper, fraction = self.locate(timestep)
        return GateRow(
            torch.lerp(self.weight[lower], self.weight[upper], fraction),
            torch.lerp(self.bias[lower], self.bias[upper], fraction),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file of gates holds, by name."""
        named = {"knots": self.knots, "weight": self.weight, "bias": self.bias, "slope": self.slope}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def slopes(self, timestep: float) -> list[float] | None:
        """Of every branch at one value of the time input; None where the table has none."""
        if self.slope is None:
            return None
        lower, upper, fraction = self.locate(timestep)
        return torch.lerp(self.slope[lower], self.slope[upper], fraction).tolist()

    def locate(self, timestep: float) -> tuple[int, int, float]:
        """Rows ``lower`` and ``upper`` around a timestep, and how far it lies from the first to the second."""
        if self.interpolation == "linear":
            apart = self.knots - timestep
            between = (apart[:-1] * apart[1:] < 0).nonzero()
            if len(between):
                lower = int(between[0])
                return lower, lower + 1, float(apart[lower] / (apart[lower] - apart[lower + 1]))
        nearest = int((self.knots - timestep).abs().argmin())
        return nearest, nearest, 0.0

    def shifted(self, amount: float) -> GateTable:
        """The same gates with ``amount`` added to every bias: positive computes more, negative reuses more."""
        return replace(self, bias=self.bias + amount)
