"""The tensors that a lifted program takes and returns beside the model's own: their names and first values."""

from __future__ import annotations

from lazy_compile.config import ReuseArm
from lazy_compile.ir.linear_reuse import CLOCK

LOGITS = "compute_logits"
"""The output that shows what every gate read: ``float32[rows, G]``."""

GATE_WEIGHT, GATE_BIAS = "gate_weight", "gate_bias"
"""The inputs that carry one row of a gate table: ``float32[sum of gate_features]`` and ``float32[G]``."""


def slot_names(branch: int, outputs: int, reuse: ReuseArm) -> list[str]:
    """``cache_{branch}_{output}`` for every output, and for linear reuse ``delta_{branch}_{output}``."""
    kinds = ("cache", "delta") if reuse == "linear" else ("cache",)
    return [f"{kind}_{branch}_{position}" for kind in kinds for position in range(outputs)]


def decision_name(branch: int) -> str:
    """The input that decides for a branch, and for those it leads: ``bool[]``."""
    return f"should_compute_{branch}"


def initial_value(slot: str) -> float:
    """What a slot is filled with before the first step of a trajectory."""
    return CLOCK.get(slot, 0.0)
