"""One capture of a model, compiled, and a call of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lazy_compile.analysis.batch_rows import batch_axis, batch_symbol
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.captured import Capture
from lazy_compile.config import Group, LazyConfig
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.lazy_branch import LazyStep, lazy_calls
from lazy_compile.ir.operators import collective_groups, example_size, size_hint, value_of
from lazy_compile.ir.program import Program, Role, parts_of
from lazy_compile.policies.gate_layout import leaders_of
from lazy_compile.runtime.compiled_pieces import CompiledPieces
from lazy_compile.runtime.compiled_program import CompiledProgram
from lazy_compile.runtime.fingerprint import Latents, moving_along, moving_beside, moving_pair
from lazy_compile.runtime.signatures import Signature, expected_signatures

MAX_SIZES = 64
"""Sizes of calls that a graph remembers the branches' signatures of."""

Source = tuple[Mapping[str, Any], str]


@dataclass(frozen=True, eq=False)
class LazyGraph:
    """One capture of the model, compiled: what calls of one layout, dtype, device and family of shapes run on.

    Attributes:
        timestep_position: which of the tensor inputs is the time input; None if none is.
        types: dtypes and devices of the tensor inputs, and autocast.
        config: the options that it was gated with.
        sources: where each parameter, buffer and constant is looked up at every call, in graph order.
        hoisted: by names of inputs that stay the same, the graph that need not compute what follows from them; this
            one if nothing does.
    """

    layout: CallLayout
    captured: Capture
    program: Program
    timestep_position: int | None
    types: tuple[Any, ...]
    total_macs: int
    sources: tuple[Source, ...]
    config: LazyConfig
    hoisted: dict[frozenset[str], LazyGraph] = field(default_factory=dict, init=False)
    _compiled: list[CompiledProgram] = field(default_factory=list, init=False)
    _signatures: dict[tuple[torch.Size, ...], Mapping[int, Signature] | None] = field(default_factory=dict, init=False)
    _leaders: dict[Group, tuple[int, ...]] = field(default_factory=dict, init=False)

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return self.program.branches

    @property
    def timestep_input(self) -> str | None:
        """The name of the time input."""
        return None if self.timestep_position is None else self.layout.names[self.timestep_position]

    @property
    def guarded_inputs(self) -> tuple[str, ...]:
        """Inputs whose values the model reads: a call that answers otherwise has another graph."""
        return tuple(self.layout.names[position] for position in self.captured.values.inputs)

    @cached_property
    def collective_groups(self) -> tuple[str, ...]:
        """Process groups in which the model exchanges tensors: all processes of them take the same decisions."""
        found = map(collective_groups, self.captured.program.graph.nodes)
        return tuple(dict.fromkeys(name for names in found for name in names))

    @cached_property
    def row_axes(self) -> dict[str, tuple[int, int]]:
        """Position and row axis of each input that has a line for each row of the batch."""
        symbol = batch_symbol(self.captured.program)
        axes = [batch_axis(fake, symbol) for fake in self.captured.fake_tensors]
        named = enumerate(zip(self.layout.names, axes, strict=True))
        return {name: (index, axis) for index, (name, axis) in named if axis is not None}

    @cached_property
    def latents(self) -> Latents | None:
        """The input that a sampler moves along: the one that an output has the shape of, or all but one size of it."""
        outputs = [value_of(node) if isinstance(node, fx.Node) else None for node in self._output_leaves]
        shapes = [
            None if position == self.timestep_position else _shape(fake)
            for position, fake in enumerate(self.captured.fake_tensors)
        ]
        found = moving_pair(shapes, list(map(_shape, outputs)))
        if found is None:
            return self._largest_input()
        shown = list(map(_shape, outputs))
        latents = self._moved(*found, outputs)
        if latents.row_axis is None and latents.axis is None:
            assert latents.output is not None
            others = moving_along(self.layout.names, shapes, shown, latents.position, latents.output)
            latents = replace(latents, others=others)
        beside = (self._moved(*pair, outputs) for pair in moving_beside(shapes, shown, latents))
        has_rows = latents.row_axis is not None
        return replace(latents, companions=tuple(each for each in beside if (each.row_axis is not None) == has_rows))

    def _moved(self, position: int, index: int, axis: int | None, outputs: Sequence[Any]) -> Latents:
        """An input that an output moves; ``axis`` as :func:`~lazy_compile.runtime.fingerprint.moving_pair` gives it."""
        fake, output = self.captured.fake_tensors[position], outputs[index]
        row, output_row = self._row_axis(fake), self._row_axis(output)
        if axis is None:
            return Latents(position, row, index, output_row)
        size = min(size_hint(fake.shape[axis]), size_hint(output.shape[axis]))
        return Latents(position, row, index, output_row, axis if row is not None and axis > row else axis + 1, size)

    def sampled_return(self, result: Any) -> dict[str, Tensor]:
        """See :meth:`~lazy_compile.runtime.fingerprint.Latents.returned`."""
        latents = self.latents
        return {} if latents is None else latents.returned(pytree.tree_leaves(result), self.layout.names)

    @property
    def _output_leaves(self) -> Sequence[Any]:
        leaves = self.captured.program.graph.output_node().args[0]
        return leaves if isinstance(leaves, list | tuple) else [leaves]

    def _row_axis(self, fake: Tensor) -> int | None:
        return batch_axis(fake, batch_symbol(self.captured.program))

    def _largest_input(self) -> Latents | None:
        """Where no output has the shape of an input: the largest one with rows that is no whole number."""
        axes = {position: axis for position, axis in self.row_axes.values() if position != self.timestep_position}
        sized = [
            (math.prod(int(size) for size in fake.shape[1:] if isinstance(size, int)), -position)
            for position, fake in enumerate(self.captured.fake_tensors)
            if position in axes and fake.is_floating_point() and fake.dim() > 1
        ]
        return None if not sized else Latents(-max(sized)[1], axes[-max(sized)[1]])

    def serves(self, layout: CallLayout, tensors: Sequence[Tensor], types: tuple[Any, ...]) -> bool:
        return types == self.types and layout == self.layout and self.captured.accepts(tensors)

    def differs_in_values(self, layout: CallLayout, tensors: Sequence[Tensor], types: tuple[Any, ...]) -> bool:
        """Whether this graph would serve the call but for the values that the model reads from its inputs."""
        fits = types == self.types and layout == self.layout and self.captured.accepts_sizes(tensors)
        return fits and not self.captured.values.hold(tensors)

    def timestep(self, tensors: Sequence[Tensor]) -> float | None:
        """The time input of a call; the noisiest row's, should they differ."""
        if self.timestep_position is None:
            return None
        return float(tensors[self.timestep_position].detach().max())

    def leaders(self, group: Group) -> tuple[int, ...]:
        """For each branch the one that decides for it, see :func:`lazy_compile.policies.gate_layout.leaders_of`."""
        if group not in self._leaders:
            self._leaders[group] = leaders_of([lazy.branch for _, lazy in lazy_calls(self.program)], group)
        return self._leaders[group]

    def signatures(self, tensors: Sequence[Tensor]) -> Mapping[int, Signature] | None:
        """What slots of each branch must agree with in calls of these sizes; None where a size depends on what is in a
        tensor, or does not follow from those of the inputs and no such call was made yet."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._signatures and not self.captured.has_open_sizes:
            self._keep_signatures(shapes, expected_signatures(self.program, self.captured.fake_tensors, tensors))
        return self._signatures.get(shapes)

    def keep_signatures(self, tensors: Sequence[Tensor], signatures: Mapping[int, Signature]) -> None:
        """Remember those that a call had."""
        if len(signatures) == len(self.branches) and not self.captured.has_open_sizes:
            self._keep_signatures(tuple(tensor.shape for tensor in tensors), signatures)

    def _keep_signatures(self, shapes: tuple[torch.Size, ...], signatures: Mapping[int, Signature] | None) -> None:
        if len(self._signatures) >= MAX_SIZES:
            self._signatures.clear()
        self._signatures[shapes] = signatures

    def state(self) -> list[Any]:
        """Current parameters, buffers and constants in graph order: a weight that was changed takes effect."""
        return [values[name] for values, name in self.sources]

    def compile(self, pieces: CompiledPieces) -> None:
        """From now on run by compiled pieces, and so do the graphs that were hoisted from this one."""
        self._compiled[:] = [CompiledProgram(self.program, pieces)]
        for each in self.hoisted.values():
            if each is not self:
                each.compile(pieces)

    def run(
        self, state: Sequence[Tensor], tensors: Sequence[Tensor], step: LazyStep, invariants: Sequence[Tensor] = ()
    ) -> Any:
        arguments = (*state, *tensors, *invariants)
        if self._compiled:
            outputs = self._compiled[0].run(arguments, step)
        else:
            outputs = self.program.graph_module(*arguments, step)
        return pytree.tree_unflatten(list(outputs), self.captured.output_spec)


def sources_of(model: nn.Module, program: Program) -> Iterator[Source]:
    """Where each parameter, buffer and constant of a program is found in the model."""
    for item in program.inputs:
        owner, _, leaf = item.name.rpartition(".")
        if item.role is Role.PARAMETER:
            yield _parameters(model, owner), leaf
        elif item.role is Role.BUFFER:
            yield model.get_submodule(owner)._buffers, leaf
        elif item.role is Role.CONSTANT:
            yield program.constants, item.name


def _parameters(model: nn.Module, owner: str) -> Mapping[str, Any]:
    """What holds the parameters of a path; one of several tensors is looked up part by part."""
    try:
        return model.get_submodule(owner)._parameters
    except AttributeError:
        path, _, leaf = owner.rpartition(".")
        return _Parts(model.get_submodule(path.rpartition(".")[0])._parameters, leaf)


@dataclass(frozen=True)
class _Parts(Mapping[str, Any]):
    """The tensors of a parameter that is a tensor subclass, as ``original0``, ``original1``, ..."""

    parameters: Mapping[str, Any]
    leaf: str

    def __getitem__(self, name: str) -> Tensor:
        return parts_of(self.parameters[self.leaf])[int(name.removeprefix("original"))]

    def __iter__(self) -> Iterator[str]:
        return (f"original{number}" for number in range(len(self)))

    def __len__(self) -> int:
        return len(parts_of(self.parameters[self.leaf]))


def _shape(value: object) -> tuple[int, ...] | None:
    """Of the call that was captured: what is computed of a size (twice its half, say) reads like another one.

    None for what holds no floating-point numbers, and where a size depends on values that were not seen.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    sizes = [size for axis in value.shape if (size := example_size(axis)) is not None]
    return tuple(sizes) if len(sizes) == value.dim() else None
