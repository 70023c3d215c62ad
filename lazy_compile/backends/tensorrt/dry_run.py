"""What a build would make, told from the ONNX file alone: no TensorRT and no GPU is needed to say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.metadata import InputSpec, OnnxMetadata, SlotSpec
from lazy_compile.backends.onnx.sizes import ShapeRange, Sizes, shape_at
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.backends.tensorrt.profile import SizeRange, fixed_sizes, size_ranges
from lazy_compile.backends.tensorrt.source import OnnxSource

REUSE = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class BuildPreview:
    """What an ONNX file, or a folder of them, would become.

    Attributes:
        onnx: the file or folder.
        engines: how many engines: one for each distinct row with ``gating="schedule"``, and one for a prologue.
        gating: who decides; empty if ``export_onnx`` did not write the file.
        branches: how many there are.
        conditionals: how many jumps an engine will have.
        tensors: inputs and outputs of the engine, of the first where there are several.
        roles: what each of them is: ``"model"``, ``"cache"``, ``"invariant"``, ``"gate"`` or ``"decision"``.
        weight_bytes: of all engines together, before TensorRT packs them.
        cache_bytes: of one stream: two buffers for each slot, of which a step reads one and writes the other; where
            sizes are free, of the example call.
        invariant_bytes: of one stream: what a prologue computes for it.
        memory: the same at the least, the best and the largest sizes of each profile; empty where the engine has
            no free size.
        speedups: share of reuse by the speed-up that the saved MACs allow at most. What the jumps cost is not in it.
            With ``gating="schedule"`` there is one entry, that of the schedule.
    """

    onnx: Path
    engines: int
    gating: str
    branches: int
    conditionals: int
    tensors: tuple[EngineTensor, ...]
    roles: tuple[str, ...]
    weight_bytes: int
    cache_bytes: int
    invariant_bytes: int
    speedups: dict[float, float]
    memory: tuple[StreamMemory, ...] = ()


@dataclass(frozen=True)
class StreamMemory:
    """What one stream takes at some sizes: ``which`` is ``"min"``, ``"opt"`` or ``"max"`` of the profile."""

    profile: int
    which: str
    sizes: dict[str, int]
    cache_bytes: int
    invariant_bytes: int


def preview(onnx: str | Path, profiles: Sequence[ShapeRange] = ()) -> BuildPreview:
    """Look at what ``export_onnx`` wrote, or at any other ONNX file.

    Args:
        onnx: the file or folder.
        profiles: the sizes to build for, see :class:`~lazy_compile.backends.tensorrt.BuildConfig`.

    Raises:
        ArtifactError: it cannot be read, or its prologue is not beside it.
        ConfigError: the shapes do not fit the file.
    """
    path = Path(onnx)
    masks = ScheduleVariants.load(path) if path.is_dir() else None
    sources = [OnnxSource.read(file) for file in (masks.files.values() if masks else [path])]
    first = sources[0]
    model = first.model
    ranges = () if model is None else size_ranges(first.dims, model, profiles, first.example)
    tensors = first.tensors if model is None else tuple(_at_sizes(first.tensors, model, fixed_sizes(ranges)))
    prologue = first.read_prologue()
    sources += [] if prologue is None else [prologue]
    speedups: dict[float, float] = {}
    if model is not None and masks is not None:
        macs = [branch.macs for branch in model.branches]
        speedups = {masks.schedule.lazy_ratio: 1 / masks.schedule.compute_ratio(macs, model.total_macs)}
    elif model is not None:
        inside = sum(branch.macs for branch in model.branches) / model.total_macs
        speedups = {reuse: 1 / max(1 - reuse * inside, 1e-3) for reuse in REUSE}
    return BuildPreview(
        path,
        len(sources),
        "" if model is None else model.gating,
        0 if model is None else len(model.branches),
        len(first.nodes) - 1,
        tensors,
        tuple(_role(tensor, model) for tensor in tensors),
        sum(source.weight_bytes for source in sources),
        0 if model is None else 2 * _bytes(model.slots, model.example),
        0 if model is None else _bytes(model.invariants, model.example),
        speedups,
        () if model is None else tuple(_memory(model, ranges)),
    )


def _at_sizes(tensors: Sequence[EngineTensor], model: OnnxMetadata, fixed: Sizes) -> Iterator[EngineTensor]:
    """The tensors with the sizes that the engine fixes."""
    engine = model.at_sizes(fixed)
    shapes = {spec.name: spec.shape for spec in (*engine.inputs, *engine.invariants, *engine.results)}
    shapes |= {name: slot.shape for slot in engine.slots for name in (slot.input, slot.output)}
    for tensor in tensors:
        shape = shapes.get(tensor.name, tensor.shape)
        yield replace(tensor, shape=tuple(size if isinstance(size, int) else -1 for size in shape))


def _memory(model: OnnxMetadata, ranges: Sequence[SizeRange]) -> Iterator[StreamMemory]:
    for index, sizes in enumerate(ranges if fixed_sizes(ranges).keys() != model.example.keys() else ()):
        for which, at in zip(("min", "opt", "max"), sizes.all, strict=True):
            yield StreamMemory(index, which, dict(at), 2 * _bytes(model.slots, at), _bytes(model.invariants, at))


def _bytes(specs: Sequence[SlotSpec | InputSpec], sizes: Sizes) -> int:
    return sum(prod(shape_at(spec.shape, sizes)) * int(getattr(torch, spec.dtype).itemsize) for spec in specs)


def _role(tensor: EngineTensor, model: OnnxMetadata | None) -> str:
    slots: Sequence[str] = [] if model is None else [name for slot in model.slots for name in (slot.input, slot.output)]
    if tensor.name in slots:
        return "cache"
    if model is not None and tensor.name in {spec.name for spec in model.invariants}:
        return "invariant"
    if model is None or tensor.name in {spec.name for spec in model.inputs} | set(model.outputs):
        return "model"
    return "decision" if tensor.dtype == "bool" else "gate"
