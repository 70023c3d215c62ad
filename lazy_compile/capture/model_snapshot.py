"""What a graph depends on silently: the state of the model around its weights."""

from __future__ import annotations

import operator
from collections import OrderedDict
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lazy_compile.capture.sharded_layers import has_shards


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that is compared by identity. It is kept alive, so that no other one can take its address."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = object.__hash__


def observe(model: nn.Module) -> tuple[Any, ...]:
    """Modules, their plain attributes and hooks, and the types of parameters: if it is equal, a graph still holds.

    Plain objects that modules hold (attention processors, settings) are looked into. A capture is always made in
    evaluation mode, and weights are looked up at every call: both may change.
    """
    seen: set[int] = set()
    waiting, modules, weights = [model], [], []
    while waiting:  # Module.modules() takes most of the time that this may take
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            modules.append((id(module), *_attributes(module, seen)))
            weights += [item if item is None else (item.dtype, item.device) for item in module._parameters.values()]
            waiting.extend(child for child in module._modules.values() if child is not None)
    return modules, weights


def changed_between(model: nn.Module, before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """What differs between two observations of a model, in words."""
    names = {id(module): name or "the model itself" for name, module in model.named_modules()}
    known = {entry[0]: dict(entry[1:]) for entry in before[0]}
    for number, *attributes in now[0]:
        if number not in known:
            return f"{names.get(number, 'a module')} is new"
        for name, value in attributes:
            if known[number].get(name, _MISSING) != value:
                return f"{name.lstrip('_')} of {names.get(number, 'a module')}"
        if gone := known[number].keys() - {name for name, _ in attributes}:
            return f"{min(gone).lstrip('_')} of {names.get(number, 'a module')}"
    return "modules were removed" if len(now[0]) < len(before[0]) else "dtype or device of its weights"


_MISSING = object()


class ModelWatch:
    """Whether a model still is what :func:`observe` saw, asked at every call.

    What its modules hold is compared with what they held, container by container, which takes half a microsecond a
    module. Only where something else lies there the model is observed anew: it may be of no account, such as the
    training mode. What merely equals what lay there before must go on to do so at every call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.observed = observe(model)
        self._remember()

    def still_holds(self) -> bool:
        if self._is_untouched():
            return True
        if observe(self._model) != self.observed:
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        self._seen: set[int] = set()
        self._parameters = list(self._model.parameters())
        self._empty: list[Any] = []
        self._mappings: list[dict[Any, Any]] = []
        self._sequences: list[Any] = []
        for module in self._model.modules():
            self._mappings.append(vars(module))
            for name, value in vars(module).items():
                if name not in _HOOKS and (name not in _BARE or name in _CONTAINERS):
                    self._watch(value)
        self._held = self._look()

    def _watch(self, value: Any) -> None:
        if not isinstance(value, dict | list | tuple):
            if type(value) in _PLAIN or isinstance(value, _OPAQUE) or not getattr(value, "__dict__", None):
                return
            value = vars(value)
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            (self._mappings if value else self._empty).append(value)
        elif isinstance(value, list):
            (self._sequences if value else self._empty).append(value)
        for item in value.values() if isinstance(value, dict) else value:
            self._watch(item)

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(tuple, map(dict.values, self._mappings))),
            list(map(tuple, self._sequences)),
            list(map(_DTYPE, self._parameters)),
            list(map(_DEVICE, self._parameters)),
        )

    def _is_untouched(self) -> bool:
        try:
            return not any(self._empty) and self._look() == self._held
        except (RuntimeError, ValueError, TypeError):  # arrays of several elements compare to no single answer
            return False


def hooked_modules(model: nn.Module) -> list[str]:
    """Paths of the modules whose forward hooks run while they are captured only, ``"the model itself"`` for that."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks) and not has_shards(module)
    ]


def dropping_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that drop values in the mode they are in: dropout layers, and those that hold a share to
    drop for attention, for recurrent layers or for whole residual branches."""
    return [name or "the model itself" for name, module in model.named_modules() if module.training and _drops(module)]


def _drops(module: nn.Module) -> bool:
    shares = [value for name, value in vars(module).items() if "drop" in name]
    if isinstance(module, _DropoutNd):
        shares.append(module.p)
    return any(isinstance(share, float) and share > 0 for share in shares)


def _attributes(module: nn.Module, seen: set[int]) -> list[tuple[str, Any]]:
    """All but what is looked up at every call; of the dictionaries of hooks, most of them empty, the filled ones."""
    return [
        (name, value if type(value) in _PLAIN else _Same(value) if name in _HOOKS else _snapshot(value, seen))
        for name, value in vars(module).items()
        if name not in LOOKED_UP and (type(value) is not OrderedDict or value)
    ]


LOOKED_UP = frozenset({"training", "_parameters", "_buffers", "_modules", "_is_torch_compile", "_compiled_call_impl"})
"""What a graph does not depend on, or looks up itself; the last two are left on a module by ``torch.compile``."""
_HOOKS = frozenset({"_hf_hook", "_diffusers_hook"})
"""Where accelerate and diffusers keep their hooks: what these note of themselves at every call says nothing of the
model, and one that comes or goes replaces the module's ``forward``."""
_PLAIN = frozenset({bool, int, float, str, type(None)})


def _snapshot(value: Any, seen: set[int]) -> Any:
    """Numbers, texts and what is made of them by value, plain objects with what they hold, everything else by identity.

    Args:
        seen: the objects that were looked into; each is once.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list | dict):
        if not value or id(value) in seen:
            return type(value), len(value)
        seen.add(id(value))
        if isinstance(value, dict):
            return tuple((key, _snapshot(item, seen)) for key, item in value.items())
        return tuple(_snapshot(item, seen) for item in value)
    if isinstance(value, _OPAQUE) or id(value) in seen or not getattr(value, "__dict__", None):
        return _Same(value)
    seen.add(id(value))
    return _Same(value), tuple((name, _snapshot(item, seen)) for name, item in vars(value).items())


_OPAQUE = nn.Module, Tensor, type, FunctionType, MethodType, ModuleType

_BARE = frozenset(vars(nn.Module()))
_CONTAINERS = {"_parameters", "_modules", *(name for name in _BARE if name.endswith(("ward_hooks", "ward_pre_hooks")))}
_DTYPE, _DEVICE = operator.attrgetter("dtype"), operator.attrgetter("device")
