"""The caches of one trajectory of an exported model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazy_compile.backends.onnx.metadata import InputSpec, SlotSpec
from lazy_compile.backends.onnx.sizes import Shape, Sizes, shape_at
from lazy_compile.backends.session import ExecutionContext
from lazy_compile.errors import BackendError, shown
from lazy_compile.runtime.tensor_snapshot import TensorSnapshot

Mask = tuple[bool, ...]
"""Whether each branch computes."""


def allocate(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that nothing was written to.

    Raises:
        BackendError: there is not so much.
    """
    try:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        kind = str(dtype).removeprefix("torch.")
        raise BackendError(
            f"no memory for {shown(list(shape), 60)} of {kind} on {device} ({shown(error)}); "
            "run a smaller batch, or a model with fewer caches: granularity='block'"
        ) from error


class BufferPool:
    """Buffers that nobody uses at the moment, by shape and dtype: sizes that come back find their memory again.

    It keeps no more bytes than were ever in use at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[tuple[Shape, torch.dtype], list[Tensor]] = {}
        self._used = self._most = self._idle = 0

    def take(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        if found := self._free.get((shape, dtype)):
            buffer = found.pop()
            self._idle -= _bytes(buffer)
        else:
            buffer = allocate(shape, dtype, self.device)
        self._used += _bytes(buffer)
        self._most = max(self._most, self._used)
        return buffer

    def give(self, buffers: Iterable[Tensor]) -> None:
        for buffer in buffers:
            self._used -= _bytes(buffer)
            if self._used + self._idle + _bytes(buffer) <= self._most:
                self._free.setdefault((tuple(buffer.shape), buffer.dtype), []).append(buffer)
                self._idle += _bytes(buffer)


@dataclass(frozen=True)
class StreamSnapshot:
    """What a :class:`Stream` held: the buffers that the next call reads, and the attributes of the same names."""

    buffers: Mapping[str, Tensor]
    invariants: Mapping[str, Tensor]
    seen: dict[str, TensorSnapshot] | None
    logits: Tensor | None
    filled: bool
    sizes: Sizes | None


class Stream:
    """The caches of one trajectory: two buffers for each slot, of which a call reads one and writes the other.

    Attributes:
        sizes: the free sizes of its calls; None before the first.
        invariants: what the prologue computed, in memory that stays the same.
        seen: the inputs that it was computed from; None before.
        logits: ``float32[rows, G]`` of its last call; None before it, and where no gate is read.
        fixed: the decisions of its last call, if a host took them; None if the gates did.
    """

    def __init__(self, slots: Sequence[SlotSpec], pool: BufferPool, invariants: Sequence[InputSpec] = ()) -> None:
        self.slots = slots
        self.filled = False
        self.sizes: Sizes | None = None
        self.contexts: dict[Mask, ExecutionContext] = {}
        self.prologue: ExecutionContext | None = None
        self.seen: dict[str, TensorSnapshot] | None = None
        self.logits: Tensor | None = None
        self.fixed: Mask | None = None
        self.invariants: dict[str, Tensor] = {}
        self.buffers: dict[str, list[Tensor]] = {}
        self._specs, self._pool = invariants, pool
        self._held: list[Tensor] = []
        weakref.finalize(self, pool.give, self._held)

    def reset(self) -> None:
        """Back to what a trajectory starts from."""
        self.filled = False
        self.seen = None
        for slot in self.slots:
            if slot.input in self.buffers:
                self.buffers[slot.input][0].fill_(slot.initial)

    def take_sizes(self, sizes: Sizes) -> None:
        """Be ready for a call of these sizes; with others than before, a trajectory starts."""
        if sizes == self.sizes:
            return
        self._pool.give(self._held)
        self._held.clear()
        self.invariants = {spec.name: self._take(spec, sizes) for spec in self._specs}
        self.buffers = {slot.input: [self._take(slot, sizes) for _ in range(2)] for slot in self.slots}
        self.sizes, self.logits = dict(sizes), None
        self.reset()

    def _take(self, spec: SlotSpec | InputSpec, sizes: Sizes) -> Tensor:
        buffer = self._pool.take(shape_at(spec.shape, sizes), getattr(torch, spec.dtype))
        self._held.append(buffer)
        return buffer

    def continue_rows(self, other: Stream, rows: Sequence[int], axes: Mapping[str, int], sizes: Sizes) -> None:
        """Take over the caches of some rows of another stream.

        Args:
            other: the stream, whose sizes differ in the number of rows alone.
            rows: which rows of it are the rows of this one, in order.
            axes: the axis of the rows of every slot that has one for each.
            sizes: those of the calls of this stream.
        """
        self.take_sizes(sizes)
        for name, pair in self.buffers.items():
            source = other.buffers[name][0]
            index = torch.tensor(rows, device=source.device)
            pair[0].copy_(source.index_select(axes[name], index) if name in axes else source)
        self.filled = other.filled
        self.logits = None if other.logits is None else other.logits[list(rows)]

    def swap(self, written: Sequence[str]) -> None:
        self.filled = True
        for name in written:
            self.buffers[name].reverse()

    def skip(self, steps: int) -> None:
        """Steps of the trajectory passed in which this stream was not called."""
        if steps and "age" in self.buffers:
            self.buffers["age"][0].add_(steps)

    def snapshot(self) -> StreamSnapshot:
        """What it holds now, to which :meth:`restore` gets back."""
        read = {name: pair[0].clone() for name, pair in self.buffers.items()}
        kept = {name: tensor.clone() for name, tensor in self.invariants.items()}
        return StreamSnapshot(read, kept, self.seen, self.logits, self.filled, self.sizes)

    def restore(self, snapshot: StreamSnapshot) -> None:
        if snapshot.sizes is None:  # it was not called yet
            self.reset()
        else:
            self.take_sizes(snapshot.sizes)
        for name, tensor in snapshot.buffers.items():
            self.buffers[name][0].copy_(tensor)
        for name, tensor in snapshot.invariants.items():
            self.invariants[name].copy_(tensor)
        self.seen, self.logits, self.filled = snapshot.seen, snapshot.logits, snapshot.filled

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, self._held))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
