"""The code that a model runs, as far as it is reached by name from its ``forward`` methods."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from lazy_compile.capture.plain_text import PlainText

_STARTS = ("forward", "__call__", "__getattr__", "__getitem__", "__iter__", "__len__", "__contains__", "__bool__")
_PLAIN = (bool, int, float, str, type(None))
_INSTALLED = ("site-packages", "dist-packages")


class ReachedCode:
    """Functions that are met, and those that these reach: by the name of a variable beside them, or of a method of any
    class that was met. Only such of the packages that the modules of the model are from, or that are not installed.

    Args:
        kinds: the classes of the modules.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self._classes: dict[type, set[str]] = {}
        self._functions: dict[FunctionType, None] = {}
        self._names = set(_STARTS)
        self._packages = {kind.__module__.partition(".")[0] for kind in kinds} - _NOT_READ

    def meet(self, value: Any) -> None:
        """Note a function or class, if its code is to be read."""
        if isinstance(value, type):
            for kind in value.__mro__:
                if self._is_read(kind):
                    self._classes.setdefault(kind, set())
        elif isinstance(value, FunctionType) and self._is_read(value):
            self._functions.setdefault(value)

    def follow(self, text: PlainText) -> None:
        """Write all that is reached from what was met."""
        read: set[FunctionType] = set()
        while True:
            members = self._new_members()
            functions = [function for function in self._functions if function not in read]
            if not members and not functions:
                return
            for name, member in members:
                text.write(f"member {name} ")
                self._add(text, member)
            for function in functions:
                read.add(function)
                self._read(text, function)

    def _new_members(self) -> list[tuple[str, Any]]:
        found = []
        for kind, done in self._classes.items():
            for name in sorted((self._names & vars(kind).keys()) - done):
                done.add(name)
                found.append((f"{kind.__qualname__}.{name}", vars(kind)[name]))
        return found

    def _add(self, text: PlainText, value: Any) -> None:
        """A member of a class, or a variable: plain values themselves, functions and classes by their code."""
        if isinstance(value, _PLAIN):
            text.add(value)
        for function in _functions_in(value):
            self.meet(function)
        if isinstance(value, type):
            self.meet(value)

    def _read(self, text: PlainText, function: FunctionType) -> None:
        names: set[str] = set()
        text.write(f"code of {function.__qualname__} ")
        for code in _codes(function.__code__):
            names.update(code.co_names)
            constants = [_constant(item) for item in code.co_consts if not isinstance(item, CodeType)]
            text.write(f"{code.co_code!r} {code.co_names} {code.co_varnames} {code.co_freevars} {constants} ")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_cells(function)):
            self._add(text, value)
        self._names |= names
        spaces = [function.__globals__]
        spaces += [
            vars(value)
            for name in sorted(names)
            if isinstance(value := function.__globals__.get(name), ModuleType) and self._is_read_from(value.__name__)
        ]
        for space in spaces:
            for name in sorted(names & space.keys()):
                text.write(f"variable {name} ")
                self._add(text, space[name])

    def _is_read(self, value: Any) -> bool:
        return isinstance(value.__module__, str) and self._is_read_from(value.__module__)

    def _is_read_from(self, module: str) -> bool:
        package = module.partition(".")[0]
        if package in self._packages:
            return True
        file = getattr(sys.modules.get(module), "__file__", None)
        return package not in _NOT_READ and not any(part in (file or "") for part in _INSTALLED)


_NOT_READ = frozenset({"torch", "numpy", "lazy_compile", *sys.stdlib_module_names}) - {"__main__"}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from _codes(item)


def _constant(value: Any) -> Any:
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions that a method, property or decorated function consists of."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, staticmethod | classmethod):
        yield from _functions_in(value.__func__)
    elif isinstance(value, property):
        yield from _functions_in(value.fget)
    elif isinstance(value, functools.cached_property | functools.partial | functools.partialmethod):
        yield from _functions_in(value.func)
    if not isinstance(value, type) and (inner := getattr(value, "__wrapped__", None)) is not None:
        yield from _functions_in(inner)
