"""What a graph depends on silently: the state of the model around its weights."""

from __future__ import annotations

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
        if name not in ("training", "_parameters", "_buffers", "_modules"):
            yield name, _snapshot(value)


def _snapshot(value: Any) -> Any:
    """Numbers, texts and what is made of them by value, everything else by identity."""
    if isinstance(value, tuple | list):
        return tuple(map(_snapshot, value))
    if isinstance(value, dict):
        return tuple((key, _snapshot(item)) for key, item in value.items())
    return value if isinstance(value, bool | int | float | str) else id(value)
