"""Tensors that a model holds otherwise than as a parameter or buffer, by the path on which they are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lazy_compile.capture.restored_state import may_change


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in attributes of the modules, and in the lists, dictionaries and plain objects that they hold.

    A path says the same in another process; parameters and buffers are not among them.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _LOOKED_UP}
        yield from _inside(own, name, seen)


_LOOKED_UP = frozenset({"_parameters", "_buffers", "_modules"})


def _inside(holder: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(holder, dict):
        items = [(str(key), value) for key, value in holder.items()]
    elif isinstance(holder, list | tuple):
        items = [(str(index), value) for index, value in enumerate(holder)]
    else:
        items = list(vars(holder).items())
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{path}/{key}", value
        elif id(value) not in seen and may_change(value):
            seen.add(id(value))
            yield from _inside(value, f"{path}/{key}", seen)
