"""What a module asks torch to do in one call, written down so that two calls can be compared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module  # what torch.func.functional_call is made of
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


class Unfollowed(Exception):
    """A call of a module that cannot be stood for by another one's; the message says why.

    Attributes:
        result: what it returned, if it was made.
    """

    def __init__(self, why: str, result: Any = None) -> None:
        super().__init__(why)
        self.result = result


class CallLog(TorchFunctionMode):
    """Writes down the calls to torch that make or write tensors, with sizes as they are on the example.

    Tensors are numbered: those given first, in their order, then each as it is made.

    Attributes:
        entries: one for each call.
        switches_gradients: whether it switched gradients on or off.
        made: what was made, to see whether it outlives the call.
        odd_size: why a size is not known on the example; empty if all are.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.odd_size = ""
        self._symbolic = any(isinstance(size, torch.SymInt) for tensor in given for size in tensor.shape)
        self.entries: list[Any] = []
        self.switches_gradients = False
        self.made: list[weakref.ref[Tensor]] = []
        self._numbers: dict[int, int] = {}
        self._count = 0
        for tensor in given:
            self._numbers.setdefault(id(tensor), self._number())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        asked = self._text(args), self._text(kwargs or {})
        result = func(*args, **(kwargs or {}))
        self.switches_gradients |= func is torch._C._set_grad_enabled
        made = [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]
        if made or result is None:  # else it asked for a size, a type, or the like
            self._number_made(func, made, [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)])
            self.entries.append((func, *asked, self._text(result), tuple(map(self._kind, made))))
        return result

    def result(self, value: Any) -> Any:
        """The same for what the module returned."""
        tensors = [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]
        return self._text(value), tuple(map(self._kind, tensors))

    def alive(self) -> list[Tensor]:
        """Of the tensors that were made, those that somebody holds."""
        return [tensor for tensor in (made() for made in self.made) if tensor is not None]

    def _number_made(self, func: Callable[..., Any], made: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        unchanged = func.__name__ in _MAY_DO_NOTHING and made and self._kind(made[0]) == self._kind(given[0])
        for tensor in made:
            if not any(tensor is each for each in given):
                self._numbers[id(tensor)] = self._numbers.get(id(given[0]), 0) if unchanged else self._number()
                self.made.append(weakref.ref(tensor))

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _text(self, value: Any) -> Any:
        """A value as something that equals its like of another call."""
        if isinstance(value, Tensor):
            number = self._numbers.get(id(value))
            return ("tensor", number) if number is not None else ("another tensor", id(value))
        if isinstance(value, tuple | list):
            return (list if type(value) is list else tuple, *map(self._text, value))
        if isinstance(value, dict):
            return (dict, *((key, self._text(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return (slice, self._text(value.start), self._text(value.stop), self._text(value.step))
        value = self._size(value)
        return (type(value), repr(value)) if type(value) in _NUMBERS else value

    def _kind(self, tensor: Tensor) -> tuple[Any, ...]:
        return tuple(map(self._size, tensor.shape)), tensor.dtype, tensor.device

    def _size(self, value: Any) -> Any:
        """As it is on the example."""
        if not isinstance(value, _SIZES):
            return value
        if value.node.hint is None:
            self.odd_size = self.odd_size or "a size depends on values"
        elif not self._symbolic:
            self.odd_size = self.odd_size or "it reads a size that it is not given"
        return value.node.hint


_MAY_DO_NOTHING = frozenset(
    {
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "contiguous", "reshape", "flatten"),
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda"),
    }
)
"""They return what they are given if there is nothing to do, in eager mode the very same tensor."""
_NUMBERS = (bool, int, float, complex)


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a module, taken apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(args, kwargs, tuple(leaves), spec)

    def with_leaves(self, leaves: Sequence[Any]) -> Call:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return Call(args, kwargs, tuple(leaves), self.spec)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def logged(self, forward: Callable[..., Any], weights: Sequence[Tensor]) -> tuple[CallLog, Any]:
        """Make the call; what was asked of torch, and what it returned.

        Raises:
            Unfollowed: it does more than to return something, or returns what it was given in another form.
        """
        given = [*self.tensors, *weights]
        versions = [tensor._version for tensor in given]
        with CallLog(given) as log:
            result = forward(*self.args, **self.kwargs)
        if log.odd_size:
            raise Unfollowed(log.odd_size, result)
        if log.switches_gradients:
            raise Unfollowed("it switches gradients on or off", result)
        if [tensor._version for tensor in given] != versions:
            raise Unfollowed("it writes to what it is given", result)
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        if spec != self.spec or any(one is not other for one, other in zip(leaves, self.leaves, strict=True)):
            raise Unfollowed("it changes a list or dictionary that it is given", result)
        returned = pytree.tree_leaves(result)
        if not all(isinstance(leaf, _RETURNED) for leaf in returned):
            raise Unfollowed("it returns more than tensors and numbers", result)
        mine = {id(leaf): leaf for leaf in returned if isinstance(leaf, Tensor)}
        own = {id(tensor) for tensor in given}
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        if any(key not in own and leaf.untyped_storage()._cdata in memory for key, leaf in mine.items()):
            raise Unfollowed("it returns a part of what it is given", result)
        reached = mine.keys() | {id(leaf._base) for leaf in mine.values()}
        if any(id(tensor) not in reached for tensor in log.alive()):
            raise Unfollowed("it keeps tensors", result)
        return log, result


_RETURNED = (Tensor, bool, int, float, str, type(None), torch.SymInt)


_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


def on_example(value: Any) -> Any:
    """A size as it is on the example.

    Raises:
        Unfollowed: it depends on values.
    """
    if not isinstance(value, _SIZES):
        return value
    if value.node.hint is None:
        raise Unfollowed("a size depends on values")
    return value.node.hint


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


@contextmanager
def outside_of_capture() -> Iterator[None]:
    """Without what records or rewrites calls to torch; a default device stays."""
    functions = [_pop_mode() for _ in _get_current_function_mode_stack()]
    kept = [mode for mode in functions if isinstance(mode, DeviceContext)]
    with _disable_current_modes(), torch._C._DisablePythonDispatcher():
        try:
            for mode in reversed(kept):
                _push_mode(mode)
            yield
        finally:
            for _ in kept:
                _pop_mode()
            for mode in reversed(functions):
                _push_mode(mode)


def rehearse(forward: Callable[..., Any], module: nn.Module, call: Call) -> tuple[list[Any], Any]:
    """Make a call beside the capture, with tensors that hold no values and are as large as on the example.

    Returns:
        What was asked of torch, and what it returned, in words.

    Raises:
        Unfollowed: see :meth:`Call.logged`.
    """
    weights = weights_of(module)
    tensors = [*call.tensors, *weights.values()]
    all_meta = all(tensor.device.type == "meta" for tensor in tensors)
    with outside_of_capture(), nullcontext() if all_meta else FakeTensorMode():
        stand_ins = {id(tensor): _without_values(tensor) for tensor in tensors}
        own = {name: stand_ins[id(tensor)] for name, tensor in weights.items()}
        beside = call.with_leaves([stand_ins.get(id(leaf), on_example(leaf)) for leaf in call.leaves])
        with _reparametrize_module(module, own):
            log, result = beside.logged(forward, list(own.values()))
        words = log.result(result)
        del result
        if log.alive():
            raise Unfollowed("it keeps tensors")
    return log.entries, words


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return dict(module.named_parameters(remove_duplicate=False)) | buffers


def _without_values(tensor: Tensor) -> Tensor:
    """One of the same kind and of the size on the example."""
    shape, stride = ([on_example(size) for size in sizes] for sizes in (tensor.shape, tensor.stride()))
    empty = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)
