"""What a model notes in plain Python while it runs, in attributes or memos: a capture leaves none of it behind."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from lazy_compile.capture.restored_tensors import tensors_left_in_place


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what is written to attributes, lists and dictionaries of the modules, and of the plain objects they hold,
    and to the variables of the files that define them; parameters and buffers lie where they lay.

    A model that keeps a table from its first call on (of rotary frequencies, say) would keep tensors of the trace,
    which hold no numbers. What ``functools.lru_cache`` keeps of its methods, and of functions beside them, is
    forgotten, and computed again when it is needed.
    """
    before = [(owner, list(owner) if isinstance(owner, list) else dict(owner)) for owner in _containers(model)]
    variables = [(space, dict(space)) for space in _files(model)]
    try:
        with tensors_left_in_place(model):
            yield
    finally:
        for owner, content in before:
            if not _is_same(owner, content):
                owner.clear()
                owner.extend(content) if isinstance(owner, list) else owner.update(content)
        for space, content in variables:
            _restore_variables(space, content)
        for memo in _memos(model):
            memo.cache_clear()


def _restore_variables(space: dict[str, Any], content: dict[str, Any]) -> None:
    """One by one: code of other threads looks its names up there."""
    for name in space.keys() - content.keys():
        del space[name]
    for name, value in content.items():
        if space.get(name, space) is not value:
            space[name] = value


def _classes(model: nn.Module) -> set[type]:
    return {kind for module in model.modules() for kind in type(module).__mro__}


def _files(model: nn.Module) -> list[dict[str, Any]]:
    """The variables of the files that define the classes of the modules."""
    files = {kind.__module__ for kind in _classes(model)}
    return [vars(sys.modules[file]) for file in files if file in sys.modules and _may_be_the_models(file)]


def _memos(model: nn.Module) -> Iterator[Any]:
    """The memos of the classes of the modules, and of the files that define them; also those inside a wrapper."""
    spaces = [vars(kind) for kind in _classes(model)] + _files(model)
    for value in (value for space in spaces for value in list(space.values())):
        cells = (value.__closure__ or ()) if isinstance(value, FunctionType) else ()
        for item in (value, *(cell.cell_contents for cell in cells if _is_filled(cell))):
            if isinstance(item, _MEMO) and _may_be_the_models(str(item.__module__)):
                yield item


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _containers(model: nn.Module) -> Iterator[Any]:
    """Every list and dictionary that is reached without passing through another module or a tensor: from a module, or
    from a variable of the files that define its class."""
    frontier: list[Any] = list(model.modules())
    frontier += [value for space in _files(model) for value in space.values() if _is_small_table(value)]
    seen = set(map(id, frontier))
    while frontier:
        owner = frontier.pop()
        if not isinstance(owner, tuple | list | dict):
            owner = vars(owner)
        if not isinstance(owner, tuple):
            yield owner
        for item in owner.values() if isinstance(owner, dict) else owner:
            if id(item) not in seen and may_change(item):
                seen.add(id(item))
                frontier.append(item)


def may_change(item: Any) -> bool:
    """A list, a dictionary, or an object of the model's own: it may hold something, and something else later."""
    if type(item) in _TABLES:
        return True
    if not hasattr(item, "__dict__") or isinstance(item, _OPAQUE):
        return False
    return _may_be_the_models(type(item).__module__)


def _is_small_table(value: Any) -> bool:
    return type(value) in _TABLES and len(value) <= _LARGEST_TABLE


def _may_be_the_models(file: str) -> bool:
    return file.partition(".")[0] not in _NOT_THE_MODELS


_TABLES = (tuple, list, dict, OrderedDict)
_LARGEST_TABLE = 4096
"""Items of a variable; what is longer is data, beside a model that was defined in a notebook."""
_MEMO = functools._lru_cache_wrapper
_NOT_THE_MODELS = ("builtins", "torch", "logging", "threading", "numpy", "bitsandbytes")
"""The last readies its weights at the first call, and for good."""
_OPAQUE = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType)


def _is_same(owner: Any, content: Any) -> bool:
    if len(owner) != len(content):
        return False
    if isinstance(owner, list):
        return all(now is then for now, then in zip(owner, content, strict=True))
    return all(key in owner and owner[key] is item for key, item in content.items())
