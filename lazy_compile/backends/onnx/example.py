"""The call that an exported model is fixed to: names, shapes and dtypes of everything that goes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lazy_compile.errors import BackendError, CaptureError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.ir.operators import size_hint, value_of
from lazy_compile.ir.program import Program, Role
from lazy_compile.ir.state_tensors import output_of_slot
from lazy_compile.runtime.module import LazyGraph, LazyModule


def example_call(
    lazy: LazyModule, inputs: Mapping[str, Any] | Sequence[Any] | None
) -> tuple[LazyGraph, Sequence[Tensor]]:
    """The graph for a call, and its tensors; zeros of the captured sizes if no call is given.

    Raises:
        BackendError: a size depends on what is in a tensor, and no call says what that is, or weights decide it. Or a
            module runs as it is, in Python.
    """
    name = type(lazy.original).__name__
    if inputs is not None:
        call = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        try:
            graph, tensors = lazy._store.find_with_known_sizes(*call, lazy.lazy_config)
        except CaptureError as error:
            raise BackendError(f"{name} cannot be converted to ONNX: {error}") from error
        _require_operators(name, graph)
        return graph, tensors
    _require_operators(name, lazy.graph)
    if lazy.graph.captured.has_open_sizes:
        raise BackendError(
            f"{name} cannot be converted to ONNX without an example call: sizes in it depend on the values of tensors; "
            "give example_inputs, with the values that the file will serve"
        )
    program = lazy.graph.captured.program
    fakes = [
        value_of(node)
        for node, item in zip(program.placeholders, program.inputs, strict=True)
        if item.role is Role.USER
    ]
    return lazy.graph, [
        torch.zeros([size_hint(size) for size in fake.shape], dtype=fake.dtype, device=fake.device) for fake in fakes
    ]


def _require_operators(name: str, graph: LazyGraph) -> None:
    for call in graph.captured.opaque:
        raise BackendError(
            f"{name} cannot be converted to ONNX: {call.path} runs as it is, in Python, since {call.reason}; write it "
            "in tensor operations, or stay in PyTorch"
        )


class _Observe:
    """A denoising step that computes everything and notes what every branch returns."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[Tensor, ...]] = {}

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        self.outputs[branch.branch.index] = branch.compute(inputs)
        return self.outputs[branch.branch.index]


def all_inputs(
    lazy: LazyModule, graph: LazyGraph, program: Program, tensors: Sequence[Tensor]
) -> list[tuple[str, Tensor]]:
    """Name and example of every input that is not a parameter; nothing is computed to find the sizes."""
    observed, mode = _Observe(), FakeTensorMode(static_shapes=True)
    state = [mode.from_tensor(tensor) for tensor in graph.state()]
    with mode, torch.no_grad():
        given = [*state, *(mode.from_tensor(tensor) for tensor in tensors)]
        invariants = graph.program.prologue(*given) if graph.program.prologue else ()
        graph.program.graph_module(*given, *invariants, observed)
    remaining, hoisted, example = iter(tensors), iter(invariants), []
    for item, fake in zip(program.inputs, program.fake_inputs(), strict=True):
        if item.role is Role.USER:
            example.append((item.name, next(remaining)))
        elif item.role in (Role.INVARIANT, Role.SLOT, Role.GATE):
            if item.role is Role.INVARIANT:
                fake = next(hoisted)
            elif item.role is Role.SLOT and (place := output_of_slot(item.name)) is not None:
                branch, output = place
                fake = observed.outputs[branch][output]
            example.append((item.name, torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)))
    names = [name for name, _ in example]
    if len(set(names)) < len(names):
        raise BackendError(
            f"an argument of {type(lazy.original).__name__} has the name of another input; rename it: {names}"
        )
    return example
