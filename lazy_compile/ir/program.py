"""The value that passes work on: a flat graph, what each of its inputs is, and the branches found in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lazy_compile.errors import CaptureError
from lazy_compile.ir.branch import Refusal, ResidualBranch


class Role(Enum):
    """What a graph input carries."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    USER = "user"
    INVARIANT = "invariant"
    LAZY_STEP = "lazy_step"
    SLOT = "slot"
    GATE = "gate"


@dataclass(frozen=True)
class ProgramInput:
    """One placeholder: its role, and the name by which its value is found (a parameter's path, an argument's path)."""

    role: Role
    name: str


@dataclass
class Program:
    """A functional graph of ATen operators over flat tensors.

    Attributes:
        graph_module: placeholders in the order of ``inputs``; it returns a tuple of flat outputs.
        inputs: one record per placeholder.
        constants: tensors that the capture lifted out of the model's code.
        output_constants: position -> value of those outputs of the model that are not tensors.
        branches: what discovery found, empty before it.
        refusals: what discovery looked at and left.
        prologue: computes the inputs of role INVARIANT from those before them; None if there are none.
        state_outputs: how many trailing outputs are cache slots and logits rather than the model's own.
    """

    graph_module: fx.GraphModule
    inputs: tuple[ProgramInput, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)
    output_constants: dict[int, Any] = field(default_factory=dict)
    branches: tuple[ResidualBranch, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    prologue: fx.GraphModule | None = None
    state_outputs: int = 0

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    def copy(self) -> Program:
        """A copy whose graph can be edited; parameters, fake tensors and branch bodies are shared."""
        graph = fx.Graph()
        result = graph.graph_copy(self.graph, {})
        graph.output(result)
        graph.output_node().meta = dict(self.graph.output_node().meta)
        return replace(self, graph_module=fx.GraphModule(self.graph_module, graph))

    @classmethod
    def from_exported(cls, exported: ExportedProgram, parameter_prefix: str = "") -> Program:
        """Take over the graph of ``torch.export``; parameters become inputs named by their path less the prefix.

        Raises:
            CaptureError: the model writes to its own buffers or inputs while it runs.
        """
        graph = fx.Graph()
        graph.output(graph.graph_copy(exported.graph, {}))
        inputs = []
        for node, spec in zip(graph.find_nodes(op="placeholder"), exported.graph_signature.input_specs, strict=True):
            if isinstance(spec.arg, ConstantArgument):
                if node.users:
                    node.replace_all_uses_with(spec.arg.value)
                graph.erase_node(node)
            elif spec.kind in _ROLE_OF_KIND and isinstance(spec.arg, TensorArgument | SymIntArgument):
                inputs.append(
                    ProgramInput(_ROLE_OF_KIND[spec.kind], (spec.target or node.name).removeprefix(parameter_prefix))
                )
            else:
                raise CaptureError(f"the graph has an input {node.name!r} of kind {spec.kind.name}, which is not known")
        for node in graph.nodes:
            node.meta["module_path"] = f"{_module_path(node)}.".removeprefix(parameter_prefix).rstrip(".")
        output_constants = {}
        for position, output in enumerate(exported.graph_signature.output_specs):
            if output.kind is not OutputKind.USER_OUTPUT:
                is_input = output.kind is OutputKind.USER_INPUT_MUTATION
                state = "one of its inputs" if is_input else repr((output.target or "").removeprefix(parameter_prefix))
                raise CaptureError(
                    f"the model changes {state} while it runs; a lazy model must be a function of its inputs: "
                    "move that state out of forward()"
                )
            if isinstance(output.arg, ConstantArgument):
                output_constants[position] = output.arg.value
        module = fx.GraphModule(exported.graph_module, graph)
        constants = {
            name.removeprefix(parameter_prefix): value
            for name, value in exported.constants.items()
            if isinstance(value, Tensor)
        }
        return cls(module, tuple(inputs), constants, output_constants)

    def bind(self, state: Mapping[str, Tensor], user: Sequence[Any]) -> list[Any]:
        """All graph inputs up to the step, in order: parameters by name from ``state``, ``user``, step invariants."""
        values, remaining = [], iter(user)
        for item in self.inputs:
            if item.role in (Role.PARAMETER, Role.BUFFER):
                values.append(state[item.name])
            elif item.role is Role.CONSTANT:
                values.append(self.constants[item.name])
            elif item.role is Role.USER:
                values.append(next(remaining))
        return [*values, *(self.prologue(*values) if self.prologue else ())]

    def name_users(self, names: Sequence[str]) -> None:
        """Name the user's inputs, in order: export knows them by position only."""
        remaining = iter(names)
        self.inputs = tuple(
            ProgramInput(item.role, next(remaining)) if item.role is Role.USER else item for item in self.inputs
        )

    def fake_inputs(self) -> list[Any]:
        return [node.meta.get("val") for node in self.placeholders]


_ROLE_OF_KIND = {
    InputKind.PARAMETER: Role.PARAMETER,
    InputKind.BUFFER: Role.BUFFER,
    InputKind.CONSTANT_TENSOR: Role.CONSTANT,
    InputKind.USER_INPUT: Role.USER,
}


def erase_dead(graph: fx.Graph) -> bool:
    """Remove what nobody uses; whether there was any."""
    modified = False
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_module", "get_attr") and not node.users:
            graph.erase_node(node)
            modified = True
    return modified


def _module_path(node: fx.Node) -> str:
    """``"model.blocks.0.attn"``; strict export spells a module as ``__dict__['_modules']['blocks']``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return re.sub(r"__dict__\['_modules'\]\['(\w+)'\]", r"\1", path)


def module_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its path, tied ones under each of their paths.

    A parameter that is made of several tensors, as quantised ones are, is there in parts: export names those of
    ``mlp.weight`` ``mlp.parametrizations.weight.original0`` and so on.
    """
    state: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if not is_traceable_wrapper_subclass(parameter):
            state[path] = parameter
            continue
        owner, _, leaf = path.rpartition(".")
        parametrized = f"{owner}.parametrizations.{leaf}.original".removeprefix(".")
        state |= {f"{parametrized}{number}": part for number, part in enumerate(parts_of(parameter))}
    return state | dict(model.named_buffers(remove_duplicate=False))


def parts_of(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor subclass is made of, in the order of torch's own flattening."""
    if not is_traceable_wrapper_subclass(parameter):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(parameter, name))]
