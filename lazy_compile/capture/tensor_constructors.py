"""Constructors such as ``torch.tensor(t)`` that would read the tensors or sizes they are given, built from those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

DtypeOf = Callable[[Tensor], torch.dtype]

_PARAMETERS = {
    "tensor": ("data",),
    "as_tensor": ("data", "dtype", "device"),
    "asarray": ("data",),
    "new_tensor": ("like", "data"),
    "full": ("size", "fill_value"),
    "full_like": ("like", "fill_value"),
    "new_full": ("like", "size", "fill_value"),
}

_SHARE = "as_tensor", "asarray"
"""These return the tensor that they are given."""

_READ_SIZES = *_SHARE, "new_tensor"
"""These make numbers of symbolic sizes; export has its own way for the others."""


def build_from_tensors(name: str, args: Sequence[Any], kwargs: dict[str, Any], dtype_of: DtypeOf) -> Tensor | None:
    """What the constructor called ``name`` returns; None if that is no constructor, or is given nothing to read.

    Args:
        name: of the function or method.
        args: by position.
        kwargs: by name.
        dtype_of: the type that a tensor is given in the result where the call names none.
    """
    if name not in _PARAMETERS:
        return None
    call = dict(zip(_PARAMETERS[name], args, strict=False)) | kwargs
    data = call.get("data", call.get("fill_value"))
    reads_sizes = name in _READ_SIZES and _holds(data, torch.SymInt | torch.SymFloat)
    if not (_holds(data, Tensor) or reads_sizes) or (name in _SHARE and isinstance(data, Tensor)):
        return None
    like = call.get("like", call.get("input"))
    options = {} if like is None else {"dtype": like.dtype, "device": like.device}
    options |= {option: call[option] for option in ("dtype", "device") if call.get(option) is not None}
    value = _stacked(data, options, dtype_of)
    size = like.shape if like is not None and name == "full_like" else call.get("size")
    return value if size is None else value.expand(tuple(size)).clone()


def _stacked(data: Any, options: dict[str, Any], dtype_of: DtypeOf) -> Tensor:
    if isinstance(data, Tensor):
        return data.detach().to(**({"dtype": dtype_of(data)} | options), copy=True)
    if isinstance(data, list | tuple):
        return torch.stack([_stacked(item, options, dtype_of) for item in data])
    return torch.tensor(data, **options)


def _holds(data: Any, kind: Any) -> bool:
    return any(isinstance(leaf, kind) for leaf in pytree.tree_leaves(data))
