"""Calls of a zoo model at other sizes than those of its example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lazy_compile.backends.onnx.metadata import BATCH, OnnxMetadata
from lazy_compile.backends.onnx.sizes import shape_at
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.errors import LazyCompileError
from zoo.subject import Call, Subject, run

STEPS = 5


def combinations(example: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try: each of them twice as large and all of them, with other batches beside."""
    others = [name for name in example if name != BATCH]
    grown = {name: 2 * example[name] for name in others}
    rows = (3, 1) if BATCH in example else ()
    yield from ({**example, BATCH: count, **grown} for count in rows if others)
    yield from ({**example, name: size} for name, size in grown.items())
    yield from ({**example, BATCH: count} for count in rows)
    yield {**example, **grown}
    # Some sizes belong together: the height and width of a square, the words and their mask.
    yield from ({**example, a: grown[a], b: grown[b]} for a in others for b in others if a < b)


def resized_calls(subject: Subject, metadata: OnnxMetadata, sizes: Mapping[str, int]) -> list[Call] | None:
    """A denoising run at these sizes; None if the file or the model itself takes no such call."""
    shapes = {spec.name: shape_at(spec.shape, sizes) for spec in metadata.inputs}
    try:
        metadata.sizes_of(shapes)
    except LazyCompileError:
        return None
    if any(size < 1 for shape in shapes.values() for size in shape):
        return None
    calls = []
    for step, call in enumerate(subject.calls(STEPS)):
        layout, tensors = CallLayout.of((), call)
        made = [
            resized(tensor, shapes[name], step if name.partition(".")[0] == subject.latents else None)
            if name in shapes
            else tensor
            for name, tensor in zip(layout.names, tensors, strict=True)
        ]
        calls.append(layout.rebuild(made)[1])
    try:
        run(subject.model, calls[:1])
    except Exception:  # whatever a model raises at sizes that it is not made for
        return None
    return calls


def resized(tensor: Tensor, shape: tuple[int, ...], step: int | None) -> Tensor:
    """The same numbers over and over, so that none is out of range; latents have noise of their own in each place."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    if step is None or not tensor.is_floating_point():
        return tensor
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(tensor)
    return tensor + 0.3 * noise
