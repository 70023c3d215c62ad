"""What a sampler made of the latents of a call: those of the next call follow from it, whatever noise was added."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from lazy_compile.runtime.fingerprint import LATENTS, Floats, samples_of, unexplained
from lazy_compile.runtime.positions import HALF, PROPORTIONAL, Position, Returned

LATEST = 8
"""Steps that wait to be read; of a model that is not called meanwhile, older ones are dropped."""


Step = tuple[Tensor, Tensor]
"""Samples of the latents before and after."""


class SamplerSteps:
    """Steps that a host has seen its sampler make, until the next call of the model reads them.

    They prove nothing by themselves: a step belongs to the position whose latents it began from, and a row continues
    that position if its latents are what the step ended with.
    """

    def __init__(self) -> None:
        self._waiting: deque[Step] = deque(maxlen=LATEST)

    def note(self, before: Tensor, after: Tensor) -> None:
        """One step: ``float[B, ...]``, the latents that it was given and those that it returned."""
        if before.shape == after.shape and before.dim() > 1 and before.numel() and not before.is_meta:
            self._waiting.append((samples_of(before), samples_of(after)))

    def waiting(self) -> list[Step]:
        """Those that nobody has noted."""
        return list(self._waiting)

    def drop(self, noted: Sequence[Step]) -> None:
        kept = [step for step in self._waiting if not any(step is other for other in noted)]
        self._waiting = deque(kept, maxlen=LATEST)

    def clear(self) -> None:
        self._waiting.clear()


_STEP = "sampler step "


def named_steps(steps: Sequence[Step]) -> dict[str, Tensor]:
    """The numbers of steps, by names of their own."""
    return {f"{_STEP}{number} {end}": each for number, pair in enumerate(steps) for end, each in enumerate(pair)}


def note_sampler_steps(found: Mapping[str, Floats], positions: Sequence[Position]) -> None:
    """Note what steps made of the latents of these positions.

    1. A scheduler hands the model a multiple of the latents: a step began from the positions of which that holds.
    2. In half precision it holds about; then from the one position near them, and from none if there are several, as
       the two halves of a short step of Heun's are.

    Args:
        found: what :func:`named_steps` returned, read.
        positions: where streams stand.
    """
    before = [name for name in found if name.startswith(_STEP) and name.endswith(" 0")]
    for name in before:
        for start, end in zip(found[name], found[f"{name[:-1]}1"], strict=True):
            apart = [_apart(position.latents, start) for position in positions]
            began = [position for position, share in zip(positions, apart, strict=True) if share <= PROPORTIONAL]  # 1
            near = [position for position, share in zip(positions, apart, strict=True) if share <= HALF]  # 2
            for position in began or (near if len(near) == 1 else ()):
                position.returned = [Returned({}, 0, {LATENTS: end}), *position.returned]


def _apart(latents: Floats | None, sample: Floats) -> float:
    """The share of latents that is no multiple of a sample."""
    if latents is None or latents.shape != sample.shape or len(sample) < 2:
        return 1.0
    return unexplained(latents[:-1], [sample[:-1]])
