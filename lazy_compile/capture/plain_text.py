"""Python values as text that is the same in every process: by what they hold, never by where they lie."""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazy_compile.digests import digest_of

_BY_REPR = (
    bool, int, float, complex, str, bytes, type(None), type(...), range, slice, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, PurePath, re.Pattern, np.generic, np.dtype,
)  # fmt: skip

_FOREIGN = frozenset({"torch", "numpy", "logging", "threading", "builtins"})
"""Packages whose objects say nothing of a model."""

_CHANCE = frozenset({"_name_or_path", "_use_default_values"})
"""Entries of a configuration of diffusers: where it was read from, and names in the order of a set."""


class PlainText:
    """Writes values one after the other.

    Args:
        write: takes the pieces of the text.
        meet: called with every function and class that is met; their code is written elsewhere.
    """

    def __init__(self, write: Callable[[str], None], meet: Callable[[Any], None]) -> None:
        self.write = write
        self._meet = meet
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []

    def is_known(self, value: Any) -> bool:
        """Whether it was written before; if so a reference to it is written."""
        if id(value) in self._numbers:
            self.write(f"#{self._numbers[id(value)]} ")
            return True
        self._numbers[id(value)] = len(self._kept)
        self._kept.append(value)  # kept, so that its id stays its own
        return False

    def add(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, enum.Enum):
                self.write(f"{type(value).__qualname__}.{value.name} ")
            elif _is_plain(value):
                self.write(f"{type(value).__qualname__} {value!r} ")
            elif isinstance(value, FunctionType | BuiltinFunctionType | type):
                self.write(f"{value.__module__}.{value.__qualname__} ")
                self._meet(value)
            elif isinstance(value, ModuleType):
                self.write(f"{value.__name__} ")
            elif not self.is_known(value):
                self.write(f"{type(value).__module__}.{type(value).__qualname__}(")
                self._meet(type(value))
                self._add_content(value)
                self.write(") ")

    def _add_content(self, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key not in _CHANCE:
                    self.add(key, item)
        elif isinstance(value, list | tuple):
            self.add(*value)
        elif isinstance(value, set | frozenset):
            self.write(" ".join(sorted(map(repr, value))) if all(map(_is_plain, value)) else "")
        elif isinstance(value, Tensor):
            self.add(value.dtype, value.shape, value.device)
        elif isinstance(value, np.ndarray):
            self.add(value.dtype, value.shape)
            self.write("" if value.dtype.hasobject else digest_of(np.ascontiguousarray(value).tobytes()))
        elif isinstance(value, MethodType):
            self.add(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self.add(value.func, value.args, value.keywords)
        if type(value).__module__.partition(".")[0] not in _FOREIGN:
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            held = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(
                value, "__dict__", {}
            )
            for name, item in sorted(held.items()):
                if name not in _CHANCE:
                    self.add(name, item)


def _is_plain(value: Any) -> bool:
    """Tuples of constants are written whole: who shares one with whom depends on how a file was loaded."""
    return isinstance(value, _BY_REPR) or (type(value) is tuple and all(map(_is_plain, value)))
