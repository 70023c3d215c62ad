"""What two calls of a model must share to run on one graph: their structure, and all that is not a tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class CallLayout:
    """The structure of a call: where its tensors go, and the value of everything that is not a tensor.

    Two calls of one layout differ only in their tensors. The layout is what a graph is specialised on.

    Attributes:
        leaves: every leaf of ``(args, kwargs)`` in order; a placeholder where a tensor stands.
        paths: what each leaf is called: ``"hidden_states"``, ``"args.0"`` or ``"added.resolution"``.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], numbers_as_tensors: Collection[str] = ()
    ) -> tuple[CallLayout, list[Tensor]]:
        """Split a call into its layout and its flat tensors.

        Args:
            args: by position.
            kwargs: by name.
            numbers_as_tensors: paths of Python numbers that become tensors ``float64[]`` or ``int64[]``, so that their
                value is no part of the layout.
        """
        pairs, spec = pytree.tree_flatten_with_path((args, kwargs))
        paths = tuple(_argument_path(path) for path, _ in pairs)
        device = next((leaf.device for _, leaf in pairs if isinstance(leaf, Tensor)), None)
        tensors, leaves = [], []
        for path, (_, leaf) in zip(paths, pairs, strict=True):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                leaves.append(_TENSOR)
            elif is_number(leaf) and path in numbers_as_tensors:
                tensors.append(torch.tensor(leaf, dtype=_NUMBERS[type(leaf)].dtype, device=device))
                leaves.append(_NUMBERS[type(leaf)])
            else:
                leaves.append(leaf)
        return cls(spec, tuple(leaves), paths), tensors

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the flat tensors."""
        return tuple(path for path, leaf in zip(self.paths, self.leaves, strict=True) if isinstance(leaf, _TensorLeaf))

    def stand_ins(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the flat tensors that are Python numbers in the model's own call."""
        leaves = [leaf for leaf in self.leaves if isinstance(leaf, _TensorLeaf)]
        return [tensor for tensor, leaf in zip(tensors, leaves, strict=True) if leaf.dtype is not None]

    @property
    def numbers(self) -> dict[str, int | float]:
        """The Python numbers of the call by their paths."""
        return {path: leaf for path, leaf in zip(self.paths, self.leaves, strict=True) if is_number(leaf)}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallLayout):
            return NotImplemented
        return self._is_alike(other) and not self._changes(other)

    __hash__ = None  # type: ignore[assignment]

    def changed_numbers(self, other: CallLayout) -> tuple[str, ...]:
        """Paths of the Python numbers that differ, if the two are alike otherwise; empty if they are not."""
        changed = self._changes(other) if self._is_alike(other) else []
        numbers = all(is_number(leaves[position]) for leaves in (self.leaves, other.leaves) for position in changed)
        return tuple(self.paths[position] for position in changed) if numbers else ()

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with these tensors."""
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, _TensorLeaf) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def _is_alike(self, other: CallLayout) -> bool:
        return self.spec == other.spec and self.paths == other.paths

    def _changes(self, other: CallLayout) -> list[int]:
        pairs = enumerate(zip(self.leaves, other.leaves, strict=True))
        return [position for position, (mine, its) in pairs if not _is_same(mine, its)]


@dataclass(frozen=True)
class _TensorLeaf:
    """Stands for a tensor, or for a number that is passed as one."""

    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        return "Tensor" if self.dtype is None else f"Tensor({self.dtype})"


_TENSOR = _TensorLeaf()
_NUMBERS = {float: _TensorLeaf(torch.float64), int: _TensorLeaf(torch.int64)}


def is_number(leaf: object) -> bool:
    """A Python number; a switch is none."""
    return type(leaf) in (int, float)


def types_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Dtypes and devices of tensors, and the autocast that is in force for them."""
    devices = sorted({tensor.device.type for tensor in tensors})
    autocast = tuple(
        (device, torch.get_autocast_dtype(device))
        for device in devices
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )
    return tuple((tensor.dtype, tensor.device) for tensor in tensors) + autocast


def _is_same(mine: object, its: object) -> bool:
    """Equal and of one type: ``True`` is not ``1``. What cannot be compared is distinguished by identity."""
    if mine is its:
        return True
    try:
        return type(mine) is type(its) and bool(mine == its)
    except (ValueError, RuntimeError):  # arrays compare to arrays
        return False


def _argument_path(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join(["args", *keys[1:]] if keys[0] == "0" else keys[1:])
