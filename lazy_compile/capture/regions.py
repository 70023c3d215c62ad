"""Modules that are repeated: the first ones of a kind are captured, and each further one is a copy of their graph.

While the model is exported, a repeat is one operator; what it returns is known from the module that was captured.
Afterwards the nodes between the two marks that were put around that one take the place of the operator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.capture.alike_modules import groups_of_alike
from lazy_compile.capture.call_log import Call, CallLog, Unfollowed, rehearse, weights_of
from lazy_compile.capture.evaluation import other_forward
from lazy_compile.capture.export_mode import ExportAid
from lazy_compile.errors import CaptureError

Forward = Callable[..., Any]


class Unlike(Exception):
    """A repeat does otherwise than the module that it was taken for a copy of: everything has to be captured."""


@dataclass(eq=False)
class Region:
    """The graph of a module, to be copied for each repeat.

    Attributes:
        path: of the module.
        entries: what it asked of torch.
        result: what it returned, in words.
        leaves: of what it returned: ``("made", i)``, ``("given", i)``, or ``("plain", value)``.
        spec: how they are put together.
        outputs: the tensors that it made: sizes, strides, type and device.
    """

    path: str
    entries: list[Any]
    result: Any
    leaves: list[tuple[str, Any]]
    spec: pytree.TreeSpec
    outputs: Sequence[tuple[Sequence[Any], Sequence[Any], torch.dtype, torch.device]]
    handle: int

    def returned(self, made: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
        values = [
            made[value] if kind == "made" else given[value] if kind == "given" else value for kind, value in self.leaves
        ]
        return pytree.tree_unflatten(values, self.spec)


@dataclass
class _Kind:
    """Calls of alike modules with arguments of one kind."""

    signature: Any
    calls: int = 0
    region: Region | None = None
    why_not: str = ""


@dataclass
class Regions:
    """The repeated modules of a model, while it is captured once.

    Attributes:
        groups: paths of alike modules.
        captured: those whose graph stands for others.
        copies: how many others there are.
        unlike: what a repeat did otherwise; empty if none did.
    """

    model: nn.Module
    groups: list[list[str]] = field(default_factory=list)
    copies: int = 0

    def __post_init__(self) -> None:
        self.unlike = ""
        self._busy = self._marked = False
        self._called: set[str] = set()
        self.captured: list[Region] = []

    @classmethod
    def of(cls, model: nn.Module) -> Regions:
        """Those of a model; none where modules have several names, by which export knows what they make."""
        modules = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
        return cls(model, groups_of_alike(model) if len(modules) == len(set(modules)) else [])

    @property
    def are_used(self) -> bool:
        """Whether there are marks in the graph of this capture."""
        return self._marked or bool(self.unlike)

    @contextmanager
    def installed(self, aid: Callable[[], ExportAid | None]) -> Iterator[None]:
        """Within this context the model is exported with marks around the first modules and an operator for each other.

        Args:
            aid: what calls to torch go through in the export.
        """
        with ExitStack() as stack:
            for group in self.groups:
                kinds: list[_Kind] = []
                for path in group:
                    module = self.model.get_submodule(path)
                    stack.enter_context(other_forward(module, self._stand_in(path, module, kinds, aid)))
            yield

    def _stand_in(
        self, path: str, module: nn.Module, kinds: list[_Kind], aid: Callable[[], ExportAid | None]
    ) -> Forward:
        original = module.forward

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            self._require(not self._busy, f"{path} is called inside another repeated module")
            again = path in self._called
            self._called.add(path)
            call = Call.of(args, kwargs)
            try:
                signature = None if again else _signature(call, aid())
            except Unfollowed:
                signature = None
            if signature is None:
                return original(*args, **kwargs)
            kind = next((kind for kind in kinds if kind.signature == signature), None)
            if kind is None:
                kinds.append(kind := _Kind(signature))
            kind.calls += 1
            if kind.calls == 1 or kind.why_not:
                return original(*args, **kwargs)
            if kind.region is None:
                return self._capture(kind, path, original, module, call, aid())
            return self._repeat(kind.region, path, original, module, call)

        return stand_in

    def _capture(
        self, kind: _Kind, path: str, forward: Forward, module: nn.Module, call: Call, aid: ExportAid | None
    ) -> Any:
        weights = list(weights_of(module).values())
        handle = next(_HANDLES)
        self._marked = True
        with torch._C.DisableTorchFunction():
            token = torch.ops.lazy_compile.region_begin(handle, call.tensors, weights)
        before = _remembered(aid)
        self._busy = True
        try:
            log, result = call.logged(forward, weights)
            if _remembered(aid) != before:
                raise Unfollowed("what it makes has no gradients", result)
            kind.region, made = _region(path, handle, log, result, call.tensors)
        except Unfollowed as reason:
            kind.why_not = str(reason)
            return reason.result
        finally:
            self._busy = False
        self.captured.append(kind.region)
        _REGIONS[handle] = kind.region
        with torch._C.DisableTorchFunction():
            made = torch.ops.lazy_compile.region_end(handle, token, made)
        return kind.region.returned(made, call.tensors)

    def _repeat(self, region: Region, path: str, forward: Forward, module: nn.Module, call: Call) -> Any:
        self._busy = True
        try:
            entries, result = rehearse(forward, module, call)
        except Exception as error:
            self._require(False, f"{path}: {error}")
            raise
        finally:
            self._busy = False
        same = (entries, result) == (region.entries, region.result)
        self._require(same, f"{path} does otherwise than {region.path}")
        with torch._C.DisableTorchFunction():
            made = torch.ops.lazy_compile.region_copy(region.handle, call.tensors, list(weights_of(module).values()))
        self.copies += 1
        return region.returned(made, call.tensors)

    def _require(self, holds: bool, why: str) -> None:
        if not holds:
            self.unlike = self.unlike or why
            raise Unlike(why)


def _region(path: str, handle: int, log: CallLog, result: Any, given: Sequence[Tensor]) -> tuple[Region, list[Tensor]]:
    positions = {id(tensor): ("given", position) for position, tensor in reversed(list(enumerate(given)))}
    made: list[Tensor] = []
    leaves: list[tuple[str, Any]] = []
    flat, spec = pytree.tree_flatten(result)
    for leaf in flat:
        if isinstance(leaf, Tensor) and id(leaf) not in positions:
            positions[id(leaf)] = ("made", len(made))
            made.append(leaf)
        leaves.append(positions[id(leaf)] if isinstance(leaf, Tensor) else ("plain", leaf))
    if not made:
        raise Unfollowed("it returns no tensor that it made", result)
    outputs = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in made]
    return Region(path, log.entries, log.result(result), leaves, spec, outputs, handle), made


def _signature(call: Call, aid: ExportAid | None) -> Any:
    """What two calls must share for the graph of one to be that of the other: all but the values of tensors."""
    if aid is None or not call.tensors:
        raise Unfollowed("it is given no tensors")
    seen: dict[int, int] = {}
    leaves: list[Any] = []
    for leaf in call.leaves:
        if isinstance(leaf, Tensor):
            place = seen.setdefault(id(leaf), len(seen))
            sizes = tuple(map(_expression, (*leaf.shape, *leaf.stride())))
            leaves.append((type(leaf), place, sizes, leaf.dtype, leaf.device, leaf.requires_grad, aid.remembers(leaf)))
        elif isinstance(leaf, torch.SymInt):
            leaves.append((torch.SymInt, _expression(leaf)))
        elif type(leaf) in _PLAIN:
            leaves.append((type(leaf), repr(leaf)))
        else:
            raise Unfollowed(f"it is given a {type(leaf).__name__}")
    kinds = sorted({tensor.device.type for tensor in call.tensors} - {"meta"})
    around = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return call.spec, leaves, around, torch.is_grad_enabled(), torch.get_default_dtype(), aid.gradients_enabled


_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})


def _expression(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    if size.node.hint is None:
        raise Unfollowed("it is given a size that depends on values")
    return size.node.expr


def _remembered(aid: ExportAid | None) -> Any:
    return None if aid is None else aid.count_remembered


_HANDLES = itertools.count(1)
_REGIONS: WeakValueDictionary[int, Region] = WeakValueDictionary()
"""By the number that stands for them in a graph."""


def _never_run() -> CaptureError:
    return CaptureError("marks of repeated modules are for a graph that is being captured; they compute nothing")


@torch.library.custom_op("lazy_compile::region_begin", mutates_args=())
def region_begin(handle: int, tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
    """A mark before the nodes of a region; its result goes into the mark behind."""
    raise _never_run()


@torch.library.custom_op("lazy_compile::region_end", mutates_args=())
def region_end(handle: int, begin: Tensor, made: list[Tensor]) -> list[Tensor]:
    """A mark behind the nodes of a region; it returns what the region made."""
    raise _never_run()


@torch.library.custom_op("lazy_compile::region_copy", mutates_args=())
def region_copy(handle: int, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Stands for the nodes of a region, with other arguments."""
    raise _never_run()


@region_begin.register_fake
def _(handle: int, tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(0)


@region_end.register_fake
def _(handle: int, begin: Tensor, made: list[Tensor]) -> list[Tensor]:
    return [_like(value.shape, value.stride(), value.dtype, value.device) for value in made]


@region_copy.register_fake
def _(handle: int, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [_like(*kind) for kind in _REGIONS[handle].outputs]


def _like(shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)
