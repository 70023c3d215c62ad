"""A module that no graph can express, as one operator: it is called eagerly, as its author wrote it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module  # what torch.func.functional_call is made of

from lazy_compile.errors import CaptureError


@dataclass(frozen=True)
class Size:
    """A size of an output: ``offset`` plus ``share`` of the product of some sizes of the inputs.

    Attributes:
        factors: input and axis of each of those sizes; none for a constant.
        share: numerator and denominator.
        offset: added to it.
    """

    factors: tuple[tuple[int, int], ...] = ()
    share: tuple[int, int] = (1, 1)
    offset: int = 0

    def of(self, shapes: Sequence[Sequence[Any]]) -> Any:
        """For inputs of these shapes, which may be symbolic."""
        if not self.factors:
            return self.offset
        product = math.prod(shapes[position][axis] for position, axis in self.factors)
        return product * self.share[0] // self.share[1] + self.offset


@dataclass(frozen=True)
class OpaqueOutput:
    """A tensor that an opaque module returns.

    Attributes:
        sizes: of its axes.
        order: the axes from the one with the longest stride to the one with the shortest.
        dtype: its type.
        like: the input whose device it is on.
    """

    sizes: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    like: int

    def empty(self, inputs: Sequence[Tensor]) -> Tensor:
        """A tensor of this kind without values, for inputs that may be fake."""
        shapes = [value.shape for value in inputs]
        sizes = [size.of(shapes) for size in self.sizes]
        memory = inputs[self.like].new_empty([sizes[axis] for axis in self.order], dtype=self.dtype)
        return memory.permute([self.order.index(axis) for axis in range(len(sizes))])

    def laid_out(self, value: Tensor) -> Tensor:
        """The same values in memory as :meth:`empty` lays them."""
        back = [self.order.index(axis) for axis in range(value.dim())]
        return value.permute(self.order).contiguous().permute(back)


@dataclass(eq=False)
class OpaqueCall:
    """One kind of call of a module that is not looked into.

    Attributes:
        path: of the module.
        reason: why it is opaque.
        module: as its author wrote it.
        call: from its flat tensors to its flat results.
        weights: paths of those of its parameters and buffers that the operator takes as arguments.
        outputs: what it returns.
        macs: multiply-accumulates at the sizes of the caller's example.
        attends: whether it was seen to attend.
        groups: the process groups in which it exchanges tensors.
        rows: which lines along the first axis it was seen to compute apart from others: any, blocks of them, or none.
        fixed: the shapes of its inputs, where what it returns was not understood for others.
    """

    path: str
    reason: str
    module: nn.Module
    call: Callable[[Sequence[Tensor]], list[Tensor]]
    weights: tuple[str, ...]
    outputs: tuple[OpaqueOutput, ...]
    macs: int
    attends: bool
    rows: Literal["any", "blocks", "none"]
    groups: tuple[str, ...] = ()
    fixed: tuple[tuple[int, ...], ...] | None = None
    handle: int = field(default_factory=itertools.count(1).__next__, init=False)

    def __post_init__(self) -> None:
        _CALLS[self.handle] = self

    def run(self, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """
        Raises:
            CaptureError: it returned something else than at the capture.
        """
        own = dict(zip(self.weights, self.own_weights(), strict=True))
        given = dict(zip(self.weights, weights, strict=True))
        changed = {name: value for name, value in given.items() if value is not own[name]}
        with _as_captured(self.module):
            if changed:
                with _reparametrize_module(self.module, changed):
                    results = self.call(tensors)
            else:
                results = self.call(tensors)
        self._check(tensors, results)
        return _apart(tensors, [output.laid_out(value) for output, value in zip(self.outputs, results, strict=True)])

    def own_weights(self) -> list[Tensor]:
        values = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        return [values[name] for name in self.weights]

    def _check(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        expected = [[size.of([value.shape for value in tensors]) for size in output.sizes] for output in self.outputs]
        if [list(value.shape) for value in results] != expected or any(
            value.dtype != output.dtype for value, output in zip(results, self.outputs, strict=True)
        ):
            raise CaptureError(
                f"{self.path} returned {_kinds(results)}, and {expected} was expected from its calls at the capture; "
                "give LazyModule.capture() a call of this size, or restore() the original"
            )


_CALLS: WeakValueDictionary[int, OpaqueCall] = WeakValueDictionary()
"""By the number that stands for them in a graph. Captures hold them."""


def opaque_call(node: fx.Node) -> OpaqueCall | None:
    """The module that a node calls; None for any other node."""
    is_one = node.op == "call_function" and node.target is torch.ops.lazy_compile.opaque.default
    return _CALLS.get(cast(int, node.args[0])) if is_one else None


@torch.library.custom_op("lazy_compile::opaque", mutates_args=())
def opaque(handle: int, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """What the :class:`OpaqueCall` of this number returns."""
    return _CALLS[handle].run(tensors, weights)


@opaque.register_fake
def _(handle: int, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    call = _CALLS[handle]
    if call.fixed is not None and call.fixed != (seen := tuple(tuple(map(int, value.shape)) for value in tensors)):
        raise ValueError(f"{call.path} was seen with inputs of shapes {list(call.fixed)} alone, not {list(seen)}")
    return [output.empty(tensors) for output in call.outputs]


def _remember(ctx: Any, inputs: tuple[int, list[Tensor], list[Tensor]], output: list[Tensor]) -> None:
    ctx.handle, tensors, weights = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *weights)


def _gradients(ctx: Any, gradients: list[Tensor | None]) -> tuple[None, list[Tensor | None], list[Tensor | None]]:
    """Call it again, this time with gradients."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() if value.requires_grad else value for value in saved]
        results = _CALLS[ctx.handle].run(leaves[: ctx.count], leaves[ctx.count :])
    pairs = zip(results, gradients, strict=True)
    followed = [(value, gradient) for value, gradient in pairs if value.requires_grad and gradient is not None]
    wanted = [leaf for leaf, value in zip(leaves, saved, strict=True) if value.requires_grad]
    found: Iterator[Tensor | None] = iter(())
    if followed and wanted:
        values, directions = zip(*followed, strict=True)
        found = iter(torch.autograd.grad(values, wanted, directions, allow_unused=True))
    answers = [next(found, None) if value.requires_grad else None for value in saved]
    return None, answers[: ctx.count], answers[ctx.count :]


opaque.register_autograd(_gradients, setup_context=_remember)


@contextmanager
def _as_captured(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, in which all of a graph is captured."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _apart(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """Results in memory of their own, as those of an operator are."""
    taken = {value.untyped_storage()._cdata for value in tensors}
    apart = []
    for value in results:
        if value.untyped_storage()._cdata in taken:
            value = value.clone()
        taken.add(value.untyped_storage()._cdata)
        apart.append(value)
    return apart


def _kinds(values: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" for value in values)
