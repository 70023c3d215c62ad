"""What the description inside a model must say to be one: types, names that exist, numbers that are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from lazy_compile.backends.onnx.sizes import names_in, value_at
from lazy_compile.errors import shown

MAX_NAME = 1000
"""Characters of a name; of anything longer no runtime makes a tensor."""

LONG_TEXTS = frozenset({"output_spec", "conditions"})


def check_types(value: Any) -> None:
    """Hold the fields of a frozen dataclass, and of those in it, against their annotations.

    Raises:
        ValueError: one is of another type, not finite, negative where it counts something, or far too long.
    """
    for name, hint in _hints(_class_of(value)).items():
        item = getattr(value, name)
        if not _is(item, hint):
            raise ValueError(f"{name} is {shown(item)}, expected {_title(hint)}")
        if isinstance(item, str) and len(item) > MAX_NAME and name not in LONG_TEXTS:
            raise ValueError(f"{name} has {len(item)} characters, more than {MAX_NAME}")
        for part in item if isinstance(item, tuple) else (item,):
            if is_dataclass(part) and type(part).__module__.startswith("lazy_compile"):
                check_types(part)
            elif isinstance(part, str) and len(part) > MAX_NAME and name not in LONG_TEXTS:
                raise ValueError(f"{name} holds a text of {len(part)} characters, more than {MAX_NAME}")


def check_contract(metadata: Any) -> None:
    """Hold an ``OnnxMetadata`` against itself.

    Raises:
        ValueError: the description contradicts itself.
    """
    check_types(metadata)
    count = len(metadata.branches)
    _expect([branch.index for branch in metadata.branches] == list(range(count)), "branches are not in order")
    _expect(len(metadata.leaders) == count, f"{len(metadata.leaders)} leaders for {count} branches")
    for place, leader in enumerate(metadata.leaders):
        _expect(0 <= leader <= place and metadata.leaders[leader] == leader, f"leaders[{place}] is {leader}")
    _expect(metadata.should_compute == () or len(metadata.should_compute) == count, "should_compute fits no branch")
    _expect((metadata.gating == "schedule") == bool(metadata.should_compute), "should_compute belongs to a schedule")
    names = [spec.name for spec in metadata.inputs]
    _expect(metadata.timestep_input is None or metadata.timestep_input in names, "timestep_input is no input")
    for kind, listed in (("inputs", names), ("slots", [slot.input for slot in metadata.slots])):
        _expect(len(set(listed)) == len(listed), f"two {kind} have one name")
    _check_sizes(metadata)
    specs: list[Any] = [*metadata.inputs, *metadata.slots, *metadata.invariants, *metadata.results]
    for spec in specs:
        _expect(isinstance(getattr(torch, spec.dtype, None), torch.dtype), f"a dtype is {shown(spec.dtype)}")
    _expect(all(slot.initial in (0.0, math.inf) for slot in metadata.slots), "a slot starts from neither 0 nor inf")
    _expect(metadata.total_macs >= 0 and metadata.conditionals >= 0, "a count is negative")
    _expect(metadata.warmup_steps >= 0 and (metadata.max_reuse_age or 1) >= 1, "a limit of reuse is out of range")
    for branch in metadata.branches:
        _expect(branch.macs >= 0, f"the MACs of {shown(branch.name)} are negative")
        for tensor in (*branch.entries, *branch.outputs):
            axes = [tensor.channel_axis, *([] if tensor.batch_axis is None else [tensor.batch_axis])]
            _expect(all(-len(tensor.shape) <= axis < len(tensor.shape) for axis in axes), "an axis does not exist")


def _check_sizes(metadata: Any) -> None:
    free = [size.name for size in metadata.sizes]
    _expect(len(set(free)) == len(free), "two sizes have one name")
    shown_in = {size for spec in metadata.inputs for size in spec.shape}
    for size in metadata.sizes:
        _expect(size.name in shown_in, f"no input has the size {shown(size.name)}")
        _expect(size.example >= 1 and 0 <= size.least <= (size.most or size.least), f"the range of {shown(size.name)}")
    specs: list[Any] = [*metadata.inputs, *metadata.slots, *metadata.invariants, *metadata.results]
    for spec in specs:
        for size in spec.shape:
            named = isinstance(size, int) or names_in(size) <= set(free)
            _expect(named and 0 <= value_at(size, metadata.example) < 2**31, f"a shape is {shown(list(spec.shape))}")
    for condition in metadata.conditions:
        _expect(names_in(condition) <= set(free), f"{shown(condition)} is about an unknown size")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _class_of(value: object) -> Any:
    return type(value)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


def _is(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is(value, option) for option in options)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin is dict:
        keys, values = options
        return isinstance(value, dict) and all(_is(key, keys) and _is(item, values) for key, item in value.items())
    if origin is tuple:
        return isinstance(value, tuple) and _all_are(value, options)
    if hint is float:  # the clock of linear reuse starts from infinity
        return type(value) in (int, float) and value == value
    if hint in (int, bool, str, type(None)):
        return type(value) is hint
    return isinstance(value, origin or hint)


def _all_are(values: Iterable[Any], options: tuple[Any, ...]) -> bool:
    values = tuple(values)
    if len(options) == 2 and options[1] is Ellipsis:
        return all(_is(item, options[0]) for item in values)
    return len(values) == len(options) and all(map(_is, values, options))


def _title(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__ if not issubclass(hint, Enum) else " or ".join(str(item.value) for item in hint)
    return str(hint).replace("typing.", "")
