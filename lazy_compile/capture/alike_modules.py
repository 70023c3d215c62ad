"""Modules that do alike: whatever they are called with, only the values of their weights tell them from each other."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

FEWEST = 3
"""Members of a group: two of them are captured as they are."""

SMALLEST = 4
"""Modules inside a member, itself included: what is smaller is captured as fast as it is replaced."""


def groups_of_alike(model: nn.Module) -> list[list[str]]:
    """Paths of the modules in lists of modules that are alike, group by group, in the order of the model.

    Of modules inside one another the outermost count. Two modules are alike if they are of one class and hold the same
    under the same names: parameters and buffers of one shape and type, modules that are alike, equal attributes. One
    with a hook, or with an attribute of its own such as the number of its layer, is like no other.
    """
    found: list[list[str]] = []
    level = [("", model)]
    while level:
        listed: list[tuple[str, nn.Module]] = []
        inner: list[tuple[str, nn.Module]] = []
        for path, module in level:
            children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
            (listed if isinstance(module, _LISTS) else inner).extend(children)
        groups = _grouped(listed)
        found += [[path for path, _ in group] for group in groups if len(group) >= FEWEST]
        level = inner + [member for group in groups if len(group) < FEWEST for member in group]
    return found


_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _grouped(modules: Iterable[tuple[str, nn.Module]]) -> list[list[tuple[str, nn.Module]]]:
    groups: list[list[tuple[str, nn.Module]]] = []
    for path, module in modules:
        large = len(list(module.modules())) >= SMALLEST
        group = next((group for group in groups if large and are_alike(group[0][1], module)), None)
        if group is None:
            groups.append([(path, module)])
        else:
            group.append((path, module))
    return groups


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules do the same with the same arguments and weights, as far as what they hold says."""
    return type(one) is type(other) and _Comparison().same(one, other)


class _Comparison:
    """A walk through two objects at once; what was met on the one side stands for what was met on the other."""

    def __init__(self) -> None:
        self._pairs: dict[int, int] = {}

    def same(self, one: Any, other: Any) -> bool:
        kind = type(one)
        if kind is not type(other):
            return False
        if kind in _PLAIN:
            return repr(one) == repr(other)
        if (known := self._pairs.get(id(one))) is not None:
            return known == id(other)
        self._pairs[id(one)] = id(other)
        if isinstance(one, nn.Module):
            return self._same_modules(one, other)
        if isinstance(one, Tensor):
            return one is other
        if one is other and isinstance(one, _SHARED):
            return True
        if isinstance(one, MethodType):
            return one.__func__ is other.__func__ and self.same(one.__self__, other.__self__)
        return self._same_objects(one, other)

    def _same_objects(self, one: Any, other: Any) -> bool:
        """Containers and plain objects by what they hold, everything else by identity."""
        base = next(kind for kind in type(one).__mro__ if not kind.__flags__ & _HEAP_TYPE)
        if isinstance(one, functools.partial):
            return all(self.same(getattr(one, name), getattr(other, name)) for name in ("func", "args", "keywords"))
        if base not in _LOOKED_INTO or hasattr(type(one), "__slots__"):
            return one is other
        if isinstance(one, dict):
            if list(one) != list(other) or not all(map(self.same, one.values(), other.values())):
                return False
        elif isinstance(one, tuple | list):
            if len(one) != len(other) or not all(map(self.same, one, other)):
                return False
        elif isinstance(one, set | frozenset) and not (one == other and all(type(item) in _PLAIN for item in one)):
            return False
        return self._same_variables(getattr(one, "__dict__", {}), getattr(other, "__dict__", {}))

    def _same_modules(self, one: nn.Module, other: nn.Module) -> bool:
        if any(getattr(module, name) for module in (one, other) for name in _HOOKS):
            return False
        return (
            _same_tensors(self._pairs, one._parameters, other._parameters)
            and _same_tensors(self._pairs, one._buffers, other._buffers)
            and self._same_variables(_own(one), _own(other))
        )

    def _same_variables(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        return list(one) == list(other) and all(self.same(value, other[name]) for name, value in one.items())


_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size, slice, range}
)
_LOOKED_INTO = (object, dict, OrderedDict, list, tuple, set, frozenset)
_HEAP_TYPE = 1 << 9
"""The flag of classes that are written in Python."""
_SHARED = (type, FunctionType, BuiltinFunctionType, ModuleType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LOOKED_AT = frozenset({"_parameters", "_buffers", *_HOOKS})


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _LOOKED_AT}


def _same_tensors(pairs: dict[int, int], one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if list(one) != list(other):
        return False
    for name, value in one.items():
        its = other[name]
        if value is None or its is None:
            if value is not its:
                return False
        elif _kind(value) != _kind(its) or pairs.setdefault(id(value), id(its)) != id(its):
            return False
    return True


def _kind(value: Tensor) -> tuple[Any, ...]:
    """All of a plain tensor but its values; of any other, the tensor itself."""
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return (id(value),)
    return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.layout
