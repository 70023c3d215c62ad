"""What identifies the rows of a call: some hundred numbers of each input, read from the device together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SAMPLES = 512
"""Elements that are read of each row of an input, at equal distances; the norm over all of them comes on top."""

LATENTS = "the latents"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Latents:
    """Which input moves along a trajectory, and which output moves it.

    Attributes:
        position: of the input among the tensors of a call.
        row_axis: its axis of rows, and ``output_row_axis`` that of the output; None where rows cannot be taken apart.
        output: index of the output among the tensors that the model returns; None if none has its shape.
        axis: the one axis, rows taken as axis 0, along which input and output differ in length; None if none does.
        size: the length that they have in common along it.
        others: further inputs that move along, with the outputs that move them, where a call takes a list of latents.
        companions: inputs with outputs of their own that a sampler moves beside these, such as the sound of a video.
    """

    position: int
    row_axis: int | None
    output: int | None = None
    output_row_axis: int | None = 0
    axis: int | None = None
    size: int = 0
    others: tuple[tuple[int, int], ...] = ()
    companions: tuple[Latents, ...] = ()

    @property
    def positions(self) -> list[int]:
        """Of all inputs that move."""
        return [self.position, *(position for position, _ in self.others)]

    def together(self, values: Sequence[Tensor], row_axis: int | None) -> Tensor:
        """The moving parts of all inputs, or of all outputs, with the rows on axis 0."""
        if len(values) == 1:
            return self.moving(values[0], row_axis)
        return torch.cat([value.flatten() for value in values])[None]

    def returned(self, outputs: Sequence[object], names: Sequence[str]) -> dict[str, Tensor]:
        """Samples of what a call returned of the latents, as :data:`LATENTS`, and of their companions by input name.

        Args:
            outputs: of the call.
            names: of all inputs.
        """
        if self.output is None:
            return {}
        moved = [outputs[index] for index in (self.output, *(output for _, output in self.others))]
        found = [value for value in moved if isinstance(value, Tensor) and not value.is_meta]
        if len(found) < len(moved):
            return {}
        result = {LATENTS: samples_of(self.together(found, self.output_row_axis))}
        for companion in self.companions:
            value = None if companion.output is None else outputs[companion.output]
            if isinstance(value, Tensor) and value.device == found[0].device:
                result[names[companion.position]] = samples_of(companion.moving(value, companion.output_row_axis))
        return result

    def moving(self, value: Tensor, row_axis: int | None) -> Tensor:
        """The part that input and output have in common, with the rows on axis 0."""
        value = _rows_first(value, row_axis)
        return value if self.axis is None else value.narrow(self.axis, 0, min(self.size, value.shape[self.axis]))

    def staying(self, value: Tensor) -> Tensor | None:
        """What else the input carries, such as a mask and a masked image beside the latents."""
        value = _rows_first(value, self.row_axis)
        if self.axis is None or value.shape[self.axis] <= self.size:
            return None
        return value.narrow(self.axis, self.size, value.shape[self.axis] - self.size)


def _rows_first(value: Tensor, row_axis: int | None) -> Tensor:
    return value[None] if row_axis is None else value.movedim(row_axis, 0)


Shape = tuple[int, ...]


def moving_along(
    names: Sequence[str], inputs: Sequence[Shape | None], outputs: Sequence[Shape | None], position: int, index: int
) -> tuple[tuple[int, int], ...]:
    """The other items of the list that holds the latents, each with an output of its shape.

    Args:
        names: of the inputs; items of one list have its name, a dot, and their place.
        inputs, outputs: shapes; None for what cannot be latents.
        position, index: of the latents, and of the output that moves them.
    """
    argument, free, found = names[position].partition(".")[0], list(range(len(outputs))), []
    free.remove(index)
    for other, name in enumerate(names):
        if other == position or name.partition(".")[0] != argument or inputs[other] is None:
            continue
        match = next((place for place in free if outputs[place] == inputs[other]), None)
        if match is not None:
            free.remove(match)
            found.append((other, match))
    return tuple(found)


def moving_beside(
    inputs: Sequence[Shape | None], outputs: Sequence[Shape | None], latents: Latents
) -> Iterator[tuple[int, int, int | None]]:
    """Pairs, as :func:`moving_pair` finds them, of the inputs and outputs that are not those of the latents."""
    taken = {latents.output, *(output for _, output in latents.others)}
    beside = [None if position in latents.positions else shape for position, shape in enumerate(inputs)]
    left = [None if index in taken else shape for index, shape in enumerate(outputs)]
    while (pair := moving_pair(beside, left)) is not None:
        yield pair
        beside[pair[0]] = left[pair[1]] = None


def moving_pair(inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> tuple[int, int, int | None] | None:
    """The input and the output of one shape, and None; else of shapes that differ along one axis, and that axis.

    Args:
        inputs, outputs: shapes; None for what cannot be latents.
    """
    best: tuple[int, int, int | None] | None = None
    for position, shape in enumerate(inputs):
        for index, other in enumerate(outputs):
            if shape is None or other is None or len(shape) != len(other) or len(shape) < 2:
                continue
            differing = [axis for axis, pair in enumerate(zip(shape, other, strict=True)) if len(set(pair)) > 1]
            if not differing:
                return position, index, None
            if len(differing) == 1 and len(shape) > 2 and best is None:
                best = position, index, differing[0]
    return best


def samples_of(rows: Tensor) -> Tensor:
    """``float[B, <= SAMPLES + 1]``: elements of each row at equal distances, and the norm of the row."""
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    flat = rows.detach().reshape(rows.shape[0], -1)
    wide = torch.float32 if flat.device.type == "mps" else torch.float64
    count = flat.shape[1]
    if count <= 1:
        return flat.to(wide)
    stride = max(1, -(-count // SAMPLES)) | 1  # odd: not always the same channel
    norm = torch.linalg.vector_norm(flat if flat.is_floating_point() else flat.float(), dim=1, keepdim=True)
    return torch.cat([flat[:, ::stride].to(wide), norm.to(wide)], dim=1)


def read(tensors: Mapping[str, Tensor]) -> dict[str, Floats]:
    """The numbers of several tensors on the host, by one copy for each device."""
    devices: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        devices.setdefault(tensor.device, []).append(name)
    result: dict[str, Floats] = {}
    for names in devices.values():
        flat = torch.cat([tensors[name].flatten() for name in names]).double().cpu().numpy()
        parts = np.split(flat, np.cumsum([tensors[name].numel() for name in names])[:-1])
        result |= {name: part.reshape(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return result


def same(first: Floats, second: Floats) -> bool:
    """Whether two rows are one: equal elements; norms may differ as the order of a sum does."""
    if first.shape != second.shape or (len(first) and first[0] != second[0]):
        return False
    if len(first) <= 1:
        return True
    norms_agree = abs(first[-1] - second[-1]) <= 1e-5 * abs(second[-1])
    return bool(norms_agree and (first[:-1] == second[:-1]).all())


def unexplained(target: Floats, by: Sequence[Floats]) -> float:
    """The share of ``target`` that no sum of multiples of ``by`` gives, from 0 to 1, less what chance would give."""
    number, size = len(by), float(np.dot(target, target))
    if not np.isfinite(size) or size == 0.0 or len(target) <= number + 1:
        return 1.0
    basis = np.stack(by, axis=1)
    if not np.isfinite(basis).all():
        return 1.0
    if number == 1:
        length = float(np.dot(by[0], by[0]))
        rest = target - by[0] * (float(np.dot(by[0], target)) / length if length else 0.0)
    else:
        rest = target - basis @ np.linalg.lstsq(basis, target, rcond=1e-9)[0]
    return min(1.0, float(np.dot(rest, rest)) / size * len(target) / (len(target) - number))
