"""Which rows go on as which, when the size of the batch changes within a trajectory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def match_rows(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """For each row now, the one row before that has the same conditions; None if rows cannot be told so.

    Classifier-free guidance that ends midway leaves the rows with a text and drops those without. An input that equals
    none of its rows before moves from step to step (latents, the time) and says nothing.

    Args:
        before: inputs of the call before by name, with the rows of the batch on axis 0.
        now: inputs of this call.
    """
    alike: Tensor | None = None
    for name, tensor in now.items():
        other = before.get(name)
        if other is None or (other.shape[1:], other.dtype, other.device) != (
            tensor.shape[1:], tensor.dtype, tensor.device,
        ):  # fmt: skip
            continue
        same = (tensor[:, None] == other[None]).reshape(len(tensor), len(other), -1).all(dim=2)
        known = same.any(dim=1)
        if known.any() and not known.all():
            return None  # a condition that only some rows had before
        if known.all():
            alike = same if alike is None else alike & same
    if alike is None or not (alike.sum(dim=1) == 1).all():
        return None
    rows = tuple(alike.int().argmax(dim=1).tolist())
    return rows if len(set(rows)) == len(rows) else None
