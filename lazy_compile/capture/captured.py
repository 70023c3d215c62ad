"""A captured graph, and which calls it serves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from lazy_compile.capture.value_guards import StateGuards, ValueGuards
from lazy_compile.ir.opaque import OpaqueCall
from lazy_compile.ir.operators import is_random, size_text, value_of
from lazy_compile.ir.program import Program, Role


@dataclass(frozen=True)
class Capture:
    """A captured program and how it was obtained.

    Attributes:
        program: the raw program, before any pass.
        rung: the way that worked, for the report.
        attempts: one line for each way that was tried before and failed.
        output_spec: how to build the model's own return value from flat outputs.
        values: what the model read from its inputs on the way, and must read again for the program to be right.
        state: what it read from its weights and buffers.
        specialised_size: where the model made a Python number of a size, which this way of export fixes.
        fixing_lines: for axes of the user's tensors that the model fixes, by position and axis, the line that does.
        opaque: the modules that it does not look into.
        copies: how many repeated modules are copies of the graph of another.
        guards: what must hold for the sizes of a call, in Python.
        is_exact: whether it was seen to return what the model returns, bit for bit.
    """

    program: Program
    rung: str
    attempts: tuple[str, ...]
    output_spec: pytree.TreeSpec
    values: ValueGuards = field(default_factory=ValueGuards)
    state: StateGuards = field(default_factory=StateGuards)
    specialised_size: str = ""
    fixing_lines: Mapping[tuple[int, int], str] = field(default_factory=dict)
    opaque: tuple[OpaqueCall, ...] = ()
    copies: int = 0
    guards: tuple[str, ...] = ()
    is_exact: bool = False
    _verdicts: dict[tuple[torch.Size, ...], bool] = field(default_factory=dict)

    def forget_operators(self) -> None:
        """Drop what torch remembers of operators on these symbolic sizes, about half a megabyte. It would stay when the
        capture goes: the environment of its sizes does."""
        sizes: list[Any] = [size for fake in self.fake_tensors for size in fake.shape]
        for environment in {size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)}:
            environment.fake_tensor_cache.clear()

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program may be run on these tensors."""
        return self.accepts_sizes(tensors) and self.state.hold() and self.values.hold(tensors)

    def accepts_sizes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program may be run on tensors of these shapes, whatever is in them."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._verdicts:
            self._verdicts[shapes] = self._sizes_match(shapes) and self._guards_hold(tensors)
        return self._verdicts[shapes]

    @cached_property
    def has_open_sizes(self) -> bool:
        """Whether a size depends on what is in a tensor, as that of ``x[mask]`` does."""
        values = [value_of(node) for node in self.program.graph.nodes]
        return any(free_unbacked_symbols(value) for value in values if isinstance(value, Tensor))

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        return any(map(is_random, self.program.graph.nodes))

    @property
    def fake_tensors(self) -> list[Tensor]:
        """What the program knows of the user's tensors: types, and sizes that may be symbolic."""
        pairs = zip(self.program.placeholders, self.program.inputs, strict=True)
        return [value_of(node) for node, item in pairs if item.role is Role.USER]

    @property
    def fixed_axes(self) -> int:
        """Of the user's tensors, how many have one size only."""
        return sum(size_text(size).isdigit() for fake in self.fake_tensors for size in fake.shape)

    def fixed_sizes(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[str]:
        """Axes of the user's tensors that are fixed and have another size in these, and the line that fixes each."""
        return [
            f"axis {axis} of {names[position]}{f', fixed {line}' if line else ''}"
            for position, (fake, tensor) in enumerate(zip(self.fake_tensors, tensors, strict=True))
            for axis, (size, seen) in enumerate(zip(fake.shape, tensor.shape, strict=False))
            if size_text(size).isdigit() and size != seen
            for line in [self.fixing_lines.get((position, axis), "")]
        ]

    def _sizes_match(self, shapes: Sequence[torch.Size]) -> bool:
        bound: dict[str, int] = {}
        for fake, shape in zip(self.fake_tensors, shapes, strict=True):
            if fake.dim() != len(shape):
                return False
            for expected, seen in zip(fake.shape, shape, strict=True):
                if bound.setdefault(str(expected), seen) != seen or (isinstance(expected, int) and expected != seen):
                    return False
        return True

    def _guards_hold(self, tensors: Sequence[Tensor]) -> bool:
        if self._guards_code is None:
            return True
        arguments = {"tensors": tensors, "flat_args": tensors}  # as export and strict export name them
        return bool(eval(self._guards_code, {"L": arguments, "math": math, "torch": torch}))

    @cached_property
    def _guards_code(self) -> CodeType | None:
        text = " and ".join(f"({guard})" for guard in self.guards)
        return compile(text, "<shape guards>", "eval") if text else None
