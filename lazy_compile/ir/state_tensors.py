"""The tensors that a lifted program takes and returns beside the model's own: their names and first values."""

from __future__ import annotations

from lazy_compile.ir.extrapolation import CLOCK, difference_names

LOGITS = "compute_logits"
"""The output that shows what every gate read: ``float32[rows, G]``."""

GATE_WEIGHT, GATE_BIAS = "gate_weight", "gate_bias"
"""The inputs that carry one row of a gate table: ``float32[sum of gate_features]`` and ``float32[G]``."""


def slot_names(branch: int, outputs: int, order: int) -> list[str]:
    """``cache_{branch}_{output}`` for every output, then ``delta_{branch}_{output}``, ``delta2_...`` up to an order."""
    kinds = ("cache", *difference_names("delta", order))
    return [f"{kind}_{branch}_{position}" for kind in kinds for position in range(outputs)]


def output_of_slot(slot: str) -> tuple[int, int] | None:
    """The branch and the output that a slot belongs to; None for one that keeps time."""
    kind, *numbers = slot.split("_")
    return (int(numbers[0]), int(numbers[1])) if kind.startswith(("cache", "delta")) else None


def decision_name(branch: int) -> str:
    """The input that decides for a branch, and for those it leads: ``bool[]``."""
    return f"should_compute_{branch}"


def initial_value(slot: str) -> float:
    """What a slot is filled with before the first step of a trajectory."""
    return CLOCK.get(slot, 0.0)
