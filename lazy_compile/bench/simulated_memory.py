"""What memory code takes on a device that is not there: the code runs on the meta device, and storages are counted.

A storage counts from when an operator returns a tensor of it until it is freed, so that what code keeps too long is
seen. Tensors on the meta device count as on the device, what is copied from there to the CPU as on the host. What
kernels take while they run, and what an allocator leaves unused, is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lazy_compile.planning.output_store import Filed, Place, TensorFile

aten = torch.ops.aten

VERDICTS = {aten.all: True, aten.any: False}
"""What a question about tensors without values is answered with: all numbers are finite, and no samples are mixed."""


class SimulatedMemory(TorchDispatchMode):
    """Within this context the bytes of all storages that operators make are counted.

    What is copied from the meta device to the host reads as zeros. They take no memory here, and are counted as if they
    did. A number that is read on the meta device is 1; for truths see :data:`VERDICTS`.

    Args:
        uncounted: tensors that are there already: the weights of a model, say.

    Attributes:
        held: bytes at each place now.
        peak: the most that there was at each place.
    """

    def __init__(self, uncounted: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[Place, int] = {"device": 0, "host": 0, "disk": 0}
        self.peak = dict(self.held)
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, tuple[Place, int]] = {}
        self._returned: dict[Any, _Returned] = {}
        for tensor in uncounted:
            self._count(tensor.untyped_storage(), "device", 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._run(func, args, kwargs or {})
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for each in result:
                if isinstance(each, Tensor):
                    self._see(each)
        return result

    def open_file(self, folder: Path | None) -> TensorFile:
        """A file for :class:`~lazy_compile.planning.output_store.Streaming` of which only the size is counted."""
        return _SimulatedFile(self)

    def add(self, place: Place, size: int) -> None:
        self.held[place] += size
        self.peak[place] = max(self.peak[place], self.held[place])

    def on_host(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Zeros on the CPU, counted as if they were in memory."""
        zero = torch.zeros((), dtype=dtype)
        self._count(zero.untyped_storage(), "host", shape.numel() * dtype.itemsize)
        return zero.expand(shape)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = func.overloadpacket
        if operator is aten.copy_ and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **kwargs)
        if operator is aten._local_scalar_dense:
            return torch.ones((), dtype=args[0].dtype).item()
        if operator in VERDICTS:
            return torch.full(func(*args, **kwargs).shape, VERDICTS[operator])
        if operator is aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return self.on_host(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        return self._on_meta(func, args, kwargs)

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator returns. Torch takes a tenth of a millisecond to find the sizes; known ones are not found
        again."""
        if not _makes_new_tensors(func):
            return func(*args, **kwargs)
        key = func, _described(args), _described(tuple(kwargs.items()))
        if (known := self._returned.get(key)) is not None:
            return known.new()
        result = func(*args, **kwargs)
        if (returned := _Returned.of(result, args[0].untyped_storage())) is not None:
            self._returned[key] = returned
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._count(storage, "device" if tensor.is_meta else "host", storage.nbytes())

    def _count(self, storage: torch.UntypedStorage, place: Place, size: int) -> None:
        key = storage._cdata
        self._forget(key)
        self._storages[key] = weakref.ref(storage, partial(self._freed, key))
        self._sizes[key] = place, size
        self.add(place, size)

    def _freed(self, key: int, _: object) -> None:
        self._forget(key)

    def _forget(self, key: int) -> None:
        if key in self._sizes:
            place, size = self._sizes.pop(key)
            del self._storages[key]
            self.held[place] -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within this context attention on the meta device keeps no scores, as the kernels of a GPU do: torch itself takes
    the way there that keeps them."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        yield


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    result: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result


@dataclass(frozen=True)
class _Returned:
    """Sizes, strides and types of new tensors that an operator returned; None for an output that was not asked for."""

    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]
    sequence: type | None

    @classmethod
    def of(cls, result: Any, given: torch.UntypedStorage) -> _Returned | None:
        """None if something is not a new tensor on the meta device, or has the storage that was given."""
        sequence = type(result) if isinstance(result, tuple | list) else None
        leaves = (result,) if sequence is None else result
        tensors = [leaf for leaf in leaves if leaf is not None]
        if not all(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tensors):
            return None
        if any(leaf.untyped_storage()._cdata == given._cdata for leaf in tensors):
            return None
        return cls(
            tuple(None if leaf is None else (leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves), sequence
        )

    def new(self) -> Any:
        made = [
            None if each is None else torch.empty_strided(each[0], each[1], dtype=each[2], device="meta")
            for each in self.tensors
        ]
        return made[0] if self.sequence is None else self.sequence(made)


@cache
def _makes_new_tensors(operator: Any) -> bool:
    return all(returned.alias_info is None for returned in operator._schema.returns)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value


class _SimulatedFile(TensorFile):
    def __init__(self, memory: SimulatedMemory) -> None:
        self._memory = memory
        self._size = 0

    def write(self, tensor: Tensor) -> Filed:
        copy = tensor.cpu()
        self._size += copy.nbytes
        self._memory.add("disk", copy.nbytes)
        return Filed(tensor.shape, tensor.dtype, tensor.device, bytes=copy.nbytes)

    def read(self, filed: Filed) -> Tensor:
        return self._memory.on_host(filed.shape, filed.dtype).to(filed.device)

    def close(self) -> None:
        self._memory.add("disk", -self._size)
