"""The call that an exported model is fixed to: names, shapes and dtypes of everything that goes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lazy_compile.backends.onnx_metadata import first_line
from lazy_compile.errors import BackendError
from lazy_compile.lazy_branch import LazyBranch
from lazy_compile.module import LazyGraph, LazyModule
from lazy_compile.operators import size_hint, value_of
from lazy_compile.program import Program, Role


def example_call(
    lazy: LazyModule, inputs: Mapping[str, Any] | Sequence[Any] | None
) -> tuple[LazyGraph, Sequence[Tensor]]:
    if isinstance(inputs, Mapping):
        return lazy._graph_for((), dict(inputs))
    if inputs is not None:
        return lazy._graph_for(tuple(inputs), {})
    program = lazy.graph.captured.program
    fakes = [
        value_of(node)
        for node, item in zip(program.placeholders, program.inputs, strict=True)
        if item.role is Role.USER
    ]
    return lazy.graph, [
        torch.zeros([size_hint(size) for size in fake.shape], dtype=fake.dtype, device=fake.device) for fake in fakes
    ]


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
    observed, mode = _Observe(), FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)  # masks may choose rows
    state = [mode.from_tensor(tensor) for tensor in graph.state()]
    try:
        with mode, torch.no_grad():
            graph.program.graph_module(*state, *(mode.from_tensor(tensor) for tensor in tensors), observed)
    except Exception as error:
        raise BackendError(
            f"{type(lazy.original).__name__} cannot be converted to ONNX: sizes in it depend on the values of tensors "
            f"({first_line(error)}); run it in PyTorch, or give it those sizes as Python numbers"
        ) from error
    remaining, example = iter(tensors), []
    for item, fake in zip(program.inputs, program.fake_inputs(), strict=True):
        if item.role is Role.USER:
            example.append((item.name, next(remaining)))
        elif item.role in (Role.SLOT, Role.GATE):
            if item.name.startswith(("cache_", "delta_")):
                _, branch, output = item.name.split("_")
                fake = observed.outputs[int(branch)][int(output)]
            example.append((item.name, torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)))
    names = [name for name, _ in example]
    if len(set(names)) < len(names):
        raise BackendError(f"an argument of {type(lazy.original).__name__} has the name of a slot; rename it: {names}")
    return example
