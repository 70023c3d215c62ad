"""What is known of a module that is not looked into: its calls are recorded, repeated, and made at other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.comparison import TOLERANCE, register_dataclasses
from lazy_compile.ir.opaque import OpaqueCall, OpaqueOutput, Size
from lazy_compile.processes import groups_exchanging, groups_that_hold

Shape = tuple[int, ...]
Rows = Literal["any", "blocks", "none"]


class Unsuitable(Exception):
    """A module cannot be one operator; the message says why."""


@dataclass(frozen=True)
class RecordedCall:
    """A call that the model made of one of its modules on the example.

    Attributes:
        layout: its structure.
        tensors: copies of its flat tensors.
        result: what the module returned.
        spec: how its flat results are put together.
        forward: the module's own.
    """

    layout: CallLayout
    tensors: list[Tensor]
    result: list[Any]
    spec: pytree.TreeSpec
    forward: Callable[..., Any]

    @classmethod
    def of(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[RecordedCall, Any]:
        """Make a call, and what it returned."""
        layout, tensors = CallLayout.of(args, kwargs)
        copies = [tensor.detach().clone() for tensor in tensors]
        result = forward(*args, **kwargs)
        register_dataclasses(result)
        leaves, spec = pytree.tree_flatten(result)
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(layout, copies, leaves, spec, forward), result

    def __call__(self, tensors: Sequence[Tensor]) -> list[Any]:
        args, kwargs = self.layout.rebuild(tensors)
        return pytree.tree_leaves(self.forward(*args, **kwargs))

    def tensors_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [leaf for leaf in self(tensors) if isinstance(leaf, Tensor)]

    def without_values(self) -> RecordedCall:
        """The same kind of call; what it was made with is let go."""
        leaves = [torch.empty(0) if isinstance(leaf, Tensor) else leaf for leaf in self.result]
        return replace(self, tensors=[], result=leaves)

    @property
    def outputs(self) -> list[Tensor]:
        return [leaf for leaf in self.result if isinstance(leaf, Tensor)]


def probe(recorded: RecordedCall, module: nn.Module, path: str, reason: str, weights: tuple[str, ...]) -> OpaqueCall:
    """Learn what a graph must know of a module, from calls of it alone.

    1. The recorded call is repeated: it must return the same again, and leave its inputs alone.
    2. It is repeated with each size twice and thrice as long, if it takes that: so the sizes of results are understood.
    3. Lines along the first axis are computed without the others: where that gives the same, rows of a batch are apart.
    4. Work is counted by :class:`torch.utils.flop_counter.FlopCounterMode`; if that sees none, as each matrix of the
       module times every token.

    Raises:
        Unsuitable: its results are no function of tensors.
    """
    if not recorded.tensors or not recorded.outputs:
        raise Unsuitable(f"{path or 'the model itself'} does not take and return tensors")
    if any(not isinstance(leaf, Tensor | _CONSTANTS) for leaf in recorded.result):
        raise Unsuitable(f"{path} returns more than tensors")
    macs, attends, groups = _repeat(recorded, module, path)
    sizes = _sizes(recorded)
    shapes = tuple(tuple(tensor.shape) for tensor in recorded.tensors)
    fixed = None if sizes else shapes
    sizes = sizes or [tuple(Size(offset=size) for size in output.shape) for output in recorded.outputs]
    outputs = tuple(
        OpaqueOutput(each, _order(output), output.dtype, _like(output, recorded.tensors))
        for each, output in zip(sizes, recorded.outputs, strict=True)
    )
    rows: Rows = "none" if fixed else _rows(recorded)
    return OpaqueCall(
        path, reason, module, recorded.without_values().tensors_of, weights, outputs, macs, attends, rows, groups, fixed
    )


_CONSTANTS = bool | int | float | str | None


# 1. and 4. --------------------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.groups: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.rpartition("::")[2])
        self.groups.update(dict.fromkeys(groups_exchanging(func, args)))
        return func(*args, **(kwargs or {}))


def _repeat(recorded: RecordedCall, module: nn.Module, path: str) -> tuple[int, bool, tuple[str, ...]]:
    tensors = [tensor.clone() for tensor in recorded.tensors]
    counter, seen = FlopCounterMode(display=False), _Operators()
    with seen, counter:
        results = recorded.tensors_of(tensors)
    if not all(map(torch.equal, tensors, recorded.tensors)):
        raise Unsuitable(f"{path} writes to its inputs")
    if not _alike(results, recorded.outputs):
        raise Unsuitable(f"{path} returns something else when it is called again, as what draws random numbers does")
    work = counter.get_total_flops() // 2
    if not work and any(tensor.is_floating_point() for tensor in tensors):
        tokens = max(math.prod(tensor.shape[:-1]) for tensor in tensors if tensor.is_floating_point())
        work = tokens * sum(map(_matrix_elements, module.modules()))
    fused = any("attention" in name for name in seen.names)
    attends = fused or ("_softmax" in seen.names and bool({"bmm", "baddbmm"} & seen.names))
    groups = dict.fromkeys((*seen.groups, *groups_that_hold(module.parameters())))
    return int(work), attends, tuple(groups)


def _matrix_elements(module: nn.Module) -> int:
    """How many numbers its own matrices hold; those of a packed one are not to be counted."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() > 1)


def _alike(seen: Sequence[Any], expected: Sequence[Tensor]) -> bool:
    """The same but for rounding."""
    if len(seen) != len(expected):
        return False
    for one, other in zip(seen, expected, strict=True):
        if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        exact = not other.is_floating_point()
        scale = 0.0 if exact or not other.numel() else float(other.abs().max())
        allowed = TOLERANCE.get(other.dtype, 0.0) * scale
        if not torch.allclose(one.double(), other.double(), rtol=0.0, atol=allowed, equal_nan=True):
            return False
    return True


def _order(value: Tensor) -> tuple[int, ...]:
    """Its axes by their strides, where that says how it lies in memory; else their own order."""
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda axis: (-strides[axis], axis))
    return tuple(order) if value.permute(order).is_contiguous() else tuple(range(value.dim()))


def _like(output: Tensor, inputs: Sequence[Tensor]) -> int:
    places = [position for position, value in enumerate(inputs) if value.device == output.device]
    return next((place for place in places if inputs[place].dtype == output.dtype), places[0] if places else 0)


# 2. ---------------------------------------------------------------------------------------------------------------


def _sizes(recorded: RecordedCall) -> list[tuple[Size, ...]] | None:
    """How the sizes of each output follow from those of the inputs; None if they are not understood."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for position, tensor in enumerate(recorded.tensors):
        for axis, size in enumerate(tensor.shape):
            groups.setdefault((axis, size), []).append((position, axis))
    seen = {}
    for (_, size), members in groups.items():
        shapes = [_shapes_of_longer(recorded, members, times) for times in (2, 3)] if size else []
        if shapes and None not in shapes:
            seen[members[0]] = (size, shapes)
    found = []
    for index, output in enumerate(recorded.outputs):
        longer = {
            member: (size, [shape[index] for shape in shapes if shape]) for member, (size, shapes) in seen.items()
        }
        if any(len(shape) != output.dim() for _, shapes in longer.values() for shape in shapes):
            return None
        sizes = [
            _size(length, {member: (size, two[axis], three[axis]) for member, (size, (two, three)) in longer.items()})
            for axis, length in enumerate(output.shape)
        ]
        if None in sizes:
            return None
        found.append(tuple(size for size in sizes if size is not None))
    return found


def _shapes_of_longer(recorded: RecordedCall, members: Sequence[tuple[int, int]], times: int) -> list[Shape] | None:
    tensors = [tensor.clone() for tensor in recorded.tensors]
    for position, axis in members:
        tensors[position] = torch.cat([tensors[position]] * times, axis)
    try:
        return [tuple(value.shape) for value in recorded.tensors_of(tensors)]
    except Exception:  # whatever the module says to a size that it does not take
        return None


def _size(length: int, seen: dict[tuple[int, int], tuple[int, int, int]]) -> Size | None:
    """How a length follows from sizes; of each of those: itself, and the length at twice and thrice as much."""
    moving = {member: lengths for member, lengths in seen.items() if lengths[1:] != (length, length)}
    if not moving:
        return Size(offset=length)
    if all(lengths[1:] == (2 * length, 3 * length) for lengths in moving.values()):
        share = Fraction(length, math.prod(size for size, *_ in moving.values()))
        return Size(tuple(moving), (share.numerator, share.denominator))
    (member, (size, twice, thrice)), *others = moving.items()
    slope = Fraction(twice - length, size)
    if others or slope.denominator != 1 or thrice - twice != twice - length:
        return None
    return Size((member,), (int(slope), 1), length - int(slope) * size)


# 3. ---------------------------------------------------------------------------------------------------------------


def _rows(recorded: RecordedCall) -> Rows:
    """Which lines along the first axis are computed apart from each other."""
    lines = next((len(tensor) for tensor in recorded.tensors if tensor.dim() > 1), 0)
    if not lines or any(not output.dim() or len(output) != lines for output in recorded.outputs):
        return "none"
    twice = [
        torch.cat([tensor, _other(tensor)]) if tensor.dim() and len(tensor) == lines else tensor
        for tensor in recorded.tensors
    ]
    everything = torch.arange(2 * lines)
    shuffled = torch.randperm(2 * lines, generator=torch.Generator().manual_seed(0))
    try:
        whole = recorded.tensors_of(twice)
        if any(len(output) != 2 * lines for output in whole):
            return "none"
        halves = [everything[:lines], everything[lines:]]
        if not all(_apart(recorded, twice, whole, half) for half in halves):
            return "none"
    except Exception:  # whatever the module says to a batch that it does not take
        return "none"
    try:
        singles = [shuffled[:lines], shuffled[: max(1, lines // 2)]]
        return "any" if all(_apart(recorded, twice, whole, some) for some in singles) else "blocks"
    except Exception:
        return "blocks"


def _other(tensor: Tensor) -> Tensor:
    """Something else of the same kind."""
    return tensor.flip(-1) if tensor.is_floating_point() and tensor.dim() > 1 else tensor.clone()


def _apart(recorded: RecordedCall, tensors: Sequence[Tensor], whole: Sequence[Tensor], lines: Tensor) -> bool:
    total = len(whole[0])
    given = [
        tensor[lines.to(tensor.device)] if tensor.dim() and len(tensor) == total else tensor.clone()
        for tensor in tensors
    ]
    return _alike(recorded.tensors_of(given), [output[lines.to(output.device)] for output in whole])
