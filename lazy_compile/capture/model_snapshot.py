"""What a graph depends on silently: the state of the model around its weights."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def observe(model: nn.Module) -> tuple[Any, ...]:
    """Modules, their plain attributes and hooks, and the types of parameters: if it is equal, a graph still holds.

    A capture is always made in evaluation mode, and weights are looked up at every call: both may change.
    """
    modules = tuple((id(module), *_attributes(module)) for module in model.modules())
    return modules, tuple((parameter.dtype, parameter.device) for parameter in model.parameters())


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
        self._parameters = list(self._model.parameters())
        self._empty: list[Any] = []
        self._mappings: list[dict[Any, Any]] = []
        self._sequences: list[Any] = []
        for module in self._model.modules():
            self._mappings.append(vars(module))
            for name, value in vars(module).items():
                if name not in _BARE or name in _CONTAINERS:
                    self._watch(value)
        self._held = self._look()

    def _watch(self, value: Any) -> None:
        if not isinstance(value, dict | list | tuple):
            return
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
    """Paths of the modules with forward hooks, the model itself as ``"the model itself"``."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
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


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _UNSEEN and "state_dict" not in name:
            yield name, _snapshot(value)


_UNSEEN = ("training", "_parameters", "_buffers", "_modules")
_BARE = frozenset(vars(nn.Module()))
_CONTAINERS = {"_parameters", "_modules", *(name for name in _BARE if name.endswith(("ward_hooks", "ward_pre_hooks")))}
_DTYPE, _DEVICE = operator.attrgetter("dtype"), operator.attrgetter("device")


def _snapshot(value: Any) -> Any:
    """Numbers, texts and what is made of them by value, everything else by identity."""
    if isinstance(value, tuple | list):
        return tuple(map(_snapshot, value))
    if isinstance(value, dict):
        return tuple((key, _snapshot(item)) for key, item in value.items())
    return value if isinstance(value, bool | int | float | str) else id(value)
