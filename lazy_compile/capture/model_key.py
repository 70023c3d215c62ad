"""What the graph of a model depends on, as a digest: the same in every process, another one when any of it changes."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lazy_compile.capture.call_layout import CallLayout, types_of
from lazy_compile.capture.model_code import ReachedCode
from lazy_compile.capture.model_snapshot import LOOKED_UP
from lazy_compile.capture.plain_text import PlainText
from lazy_compile.digests import digest_of, new_digest


def capture_key(model: nn.Module, layout: CallLayout, tensors: Sequence[Tensor], *options: Any) -> str:
    """64 hexadecimal digits for captures of ``model`` on calls like this one, of any sizes.

    It covers

    1. the versions of Python, torch and the code that makes captures,
    2. the modules: their plain attributes, their hooks, and names, shapes, types and devices of their weights,
    3. the code that they run, and the plain values that it reads beside them, see :class:`ReachedCode`,
    4. the call: its structure, all in it that is no tensor, and types and devices of its tensors,
    5. the default type, and autocast.

    Values of weights are no part of it. What is missing here changes what the model returns, which a graph that is read
    is compared with.

    Raises:
        Exception: of any kind, where an object that the model holds cannot be looked at.
    """
    content = new_digest()
    code = ReachedCode(module.__class__ for module in model.modules())
    text = PlainText(lambda piece: content.update(piece.encode()), code.meet)
    text.add(platform.python_version_tuple()[:2], str(torch.__version__), _own_code(), options)
    text.add(str(layout.spec), layout.paths, layout.leaves)
    text.add(types_of(tensors), torch.get_default_dtype())
    for name, module in model.named_modules(remove_duplicate=False):
        text.write(f"module {name} ")
        if not text.is_known(module):
            _add_module(text, module)
    code.follow(text)
    return str(content.hexdigest())


def _add_module(text: PlainText, module: nn.Module) -> None:
    """A module without those inside of it."""
    text.add(type(module))
    for name, weight in (*module._parameters.items(), *module._buffers.items()):
        text.write(f"weight {name} ")
        if weight is None or not text.is_known(weight):
            text.add(None if weight is None else _kind(weight))
    for name, value in sorted(vars(module).items()):
        if name in LOOKED_UP or (name in _EMPTY_AS_A_RULE and not value):
            continue
        text.write(f"attribute {name} ")
        text.add(list(value.values()) if name.endswith("_hooks") else value)  # by numbers that count all hooks


_EMPTY_AS_A_RULE = frozenset(vars(nn.Module()))


def _kind(weight: Tensor) -> list[Any]:
    described = [type(weight).__qualname__, weight.shape, weight.dtype, weight.device, str(weight.layout)]
    if is_traceable_wrapper_subclass(weight):
        names, context = weight.__tensor_flatten__()
        return [*described, *((name, _kind(getattr(weight, name))) for name in names), context]
    return [*described, weight.stride() if weight.layout is torch.strided else None]


@functools.cache
def _own_code() -> str:
    """Of the code that makes captures, whichever version it says it is."""
    package = Path(__file__).parents[1]
    files = sorted(file for folder in ("capture", "ir") for file in (package / folder).glob("*.py"))
    return digest_of(*(file.read_bytes() for file in files))
