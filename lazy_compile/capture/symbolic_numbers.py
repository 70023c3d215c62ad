"""``int(size)`` and ``len(tensor)`` in a model's code, without making a number of a symbolic size.

torch.export keeps sizes symbolic while a model computes with them, but Python's own ``int`` and ``len`` must return
numbers, which fixes the size. In the modules that a model's classes come from, these names are shadowed for a while.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class _LikeInt(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, int | torch.SymInt)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is int

    __hash__ = type.__hash__


class _Int(int, metaclass=_LikeInt):
    """``int``, but what was computed from sizes stays symbolic. ``type(x) is int`` does not hold under this name."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.SymInt):
            return args[0]
        if len(args) == 1 and isinstance(args[0], torch.SymFloat):
            return torch.sym_int(args[0])
        return int(*args, **kwargs)


def _len(item: Any) -> Any:
    return item.shape[0] if isinstance(item, Tensor) and item.dim() else len(item)


SHADOWS = {"int": _Int, "len": _len}


@contextmanager
def sizes_stay_symbolic(model: nn.Module) -> Iterator[None]:
    """Within this context, for the code of the modules that the classes of ``model`` were defined in."""
    shadowed = [(module, name) for module in _modules_of(model) for name in SHADOWS if name not in vars(module)]
    try:
        for module, name in shadowed:
            setattr(module, name, SHADOWS[name])
        yield
    finally:
        for module, name in shadowed:
            vars(module).pop(name, None)


def _modules_of(model: nn.Module) -> list[ModuleType]:
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    names = {name for name in names if name.partition(".")[0] not in ("torch", builtins.__name__, "lazy_compile")}
    return [module for name in sorted(names) if (module := sys.modules.get(name)) is not None]
