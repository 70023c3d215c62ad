"""A capture as values of JSON and tensors: the text that is kept on disk. Reading it runs no code of the file.

Weights are names, bound to the model that reads it. Operators are names too, looked up among those of ATen.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, _suppress_guards
from torch.utils import _pytree as pytree

from lazy_compile.capture.captured import Capture
from lazy_compile.capture.held_tensors import held_tensors
from lazy_compile.capture.written_guards import check_guard
from lazy_compile.capture.written_sizes import SizeReader, SizeWriter, Unwritable
from lazy_compile.errors import ArtifactError
from lazy_compile.ir.operators import NUMBERS, value_of
from lazy_compile.ir.program import Program, ProgramInput, Role
from lazy_compile.tree_specs import load_tree_spec

FORMAT = 1

Written = dict[str, Any]


def write_capture(capture: Capture, model: nn.Module) -> tuple[Written, dict[str, Tensor]]:
    """The text of a capture, and the tensors that it needs and the model does not hold.

    Raises:
        Unwritable: something in it has no written form; the message says what.
    """
    if capture.values or capture.state.guards:
        raise Unwritable("it reads values")
    if capture.opaque:
        raise Unwritable("it has opaque modules")
    if capture.is_random:
        raise Unwritable("it draws random numbers")
    program, values = capture.program, _Writer()
    nodes = [values.node(node) for node in program.graph.nodes]
    constants, tensors = _constants(program, model)
    written = {
        "format": FORMAT,
        "rung": capture.rung,
        "attempts": list(capture.attempts),
        "specialised_size": capture.specialised_size,
        "fixing_lines": [[*place, line] for place, line in sorted(capture.fixing_lines.items())],
        "copies": capture.copies,
        "is_exact": capture.is_exact,
        "guards": [_checked(check_guard, guard) for guard in capture.guards],
        "output_spec": _spec(capture.output_spec),
        "inputs": [[item.role.value, item.name] for item in program.inputs],
        "constants": constants,
        "output_constants": [[place, values.value(value)] for place, value in program.output_constants.items()],
        "nodes": nodes,
        "environment": values.sizes.environment(values.environment),
        "sizes": values.sizes.table,
    }
    return written, tensors


def read_capture(written: Written, tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> Capture:
    """The capture that :func:`write_capture` wrote, for this model.

    Raises:
        ArtifactError: it names something that is refused, or that this process or model does not have.
        Exception: of any kind, where it is not of that form.
    """
    if written["format"] != FORMAT:
        raise ArtifactError(f"{where} has format {written['format']}, and {FORMAT} was expected")
    output_spec = load_tree_spec(written["output_spec"], where)
    if output_spec is None:
        raise ArtifactError(f"{where} returns a type that is not known here")
    values = _Reader(written)
    program = Program(
        fx.GraphModule(nn.Module(), values.graph(written["nodes"])),
        tuple(ProgramInput(Role(role), str(name)) for role, name in written["inputs"]),
        _bound(written["constants"], tensors, model),
        {int(place): values.value(value) for place, value in written["output_constants"]},
    )
    values.finish()
    program.graph.lint()
    if [kind for kind, *_ in written["nodes"]].count("output") != 1 or program.graph.output_node().next.op != "root":
        raise ArtifactError(f"{where} does not end with what it returns")
    if len(program.placeholders) != len(program.inputs):
        raise ArtifactError(f"{where} has {len(program.placeholders)} inputs and names {len(program.inputs)}")
    return Capture(
        program,
        str(written["rung"]),
        tuple(map(str, written["attempts"])),
        output_spec,
        specialised_size=str(written["specialised_size"]),
        fixing_lines={(int(position), int(axis)): str(line) for position, axis, line in written["fixing_lines"]},
        copies=int(written["copies"]),
        is_exact=written["is_exact"] is True,
        guards=tuple(check_guard(guard, where) for guard in written["guards"]),
    )


def _checked(check: Callable[[str, str], str], text: str) -> str:
    try:
        return check(text, "it")
    except ArtifactError as error:
        raise Unwritable(str(error)) from error


def _spec(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
        known = load_tree_spec(text, "it")
    except (ArtifactError, NotImplementedError, TypeError) as error:
        raise Unwritable(f"it returns {spec}") from error
    if known != spec:
        raise Unwritable(f"it returns {spec}")
    return text


def _constants(program: Program, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where the model holds each constant; those that it does not hold are kept themselves."""
    names = [item.name for item in program.inputs if item.role is Role.CONSTANT]
    paths = {id(tensor): path for path, tensor in held_tensors(model)} if names else {}
    places, tensors = {}, {}
    for name in names:
        value = program.constants[name]
        places[name] = paths.get(id(value))
        if places[name] is None:
            if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
                raise Unwritable(f"its constant {name} is no plain tensor")
            tensors[name] = value.detach()
    return places, tensors


def _bound(places: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    held = dict(held_tensors(model)) if any(places.values()) else {}
    return {name: tensors[name] if path is None else held[path] for name, path in places.items()}


class _Writer:
    """Writes the nodes of one graph."""

    def __init__(self) -> None:
        self.sizes = SizeWriter()
        self.environment: ShapeEnv | None = None
        self._numbers: dict[fx.Node, int] = {}

    def node(self, node: fx.Node) -> list[Any]:
        self._numbers[node] = len(self._numbers)
        described = [self._recorded(value_of(node)), node.meta.get("module_path")]
        if node.op == "placeholder":
            return ["placeholder", node.name, *described]
        if node.op == "output":
            return ["output", self.value(node.args[0]), *described]
        if node.op != "call_function":
            raise Unwritable(f"its graph holds other graphs ({node.name})")
        arguments = [self.value(node.args), self.value(node.kwargs)]
        return ["call", node.name, _name_of(node.target), *arguments, *described]

    def value(self, value: Any) -> Any:
        """An argument of a node."""
        if isinstance(value, fx.Node):
            return {"node": self._numbers[value]}
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return {"tuple": [self.value(item) for item in value]}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {"dict": [[self.value(key), self.value(item)] for key, item in value.items()]}
        if isinstance(value, (*NUMBERS, torch.SymBool)):
            return self._size(value)
        for name, (kind, write, _) in _KINDS.items():
            if type(value) is kind:
                return {name: write(value)}
        raise Unwritable(f"an argument is a {type(value).__name__}")

    def _recorded(self, value: Any) -> Any:
        """What export recorded for a node."""
        if isinstance(value, Tensor):
            if type(value) is not FakeTensor or value.layout is not torch.strided or value.is_quantized:
                raise Unwritable(f"a value is a {type(value).__name__}, {value.layout}")
            sizes, strides = ([self._axis(size) for size in axes] for axes in (value.shape, value.stride()))
            return {"tensor": [str(value.dtype), str(value.device), sizes, strides, value.requires_grad]}
        if isinstance(value, tuple | list):
            written = [self._recorded(item) for item in value]
            return written if isinstance(value, list) else {"tuple": written}
        return self.value(value)

    def _axis(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        return int(size.node.expr) if size.node.expr.is_Integer else self._size(size)

    def _size(self, size: Any) -> Any:
        node = size.node
        if self.environment not in (None, node.shape_env):
            raise Unwritable("its sizes come from two environments")
        self.environment = node.shape_env
        return {"size": [node.pytype.__name__, self.sizes.number(node.expr)]}


class _Reader:
    """Builds the graph that a :class:`_Writer` wrote."""

    def __init__(self, written: Written) -> None:
        self._environment = written["environment"]
        self._sizes = SizeReader(written["sizes"], self._environment)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._sizes.sizes, export=True)
        self._nodes: list[fx.Node] = []
        self._kinds: dict[str, Tensor] = {}

    def graph(self, written: list[Any]) -> fx.Graph:
        graph = fx.Graph()
        with _suppress_guards(self._sizes.sizes or ShapeEnv()):
            for kind, *parts in written:
                self._nodes.append(self._node(graph, kind, parts))
        return graph

    def finish(self) -> None:
        """No further value is read."""
        self._sizes.learn(self._environment)

    def _node(self, graph: fx.Graph, kind: str, parts: list[Any]) -> fx.Node:
        *parts, recorded, path = parts
        if kind == "output":
            node: fx.Node = graph.output(self.value(parts[0]))
        elif kind == "placeholder":
            node = graph.create_node("placeholder", _identifier(parts[0]), (), {}, _identifier(parts[0]))
        else:
            name, target, args, kwargs = parts
            node = graph.create_node(
                "call_function", _operator(target), self.value(args), self.value(kwargs), _identifier(name)
            )
        if (value := self.value(recorded)) is not None:
            node.meta["val"] = value
        if path is not None:
            node.meta["module_path"] = str(path)
        return node

    def value(self, written: Any) -> Any:
        if isinstance(written, list):
            return [self.value(item) for item in written]
        if not isinstance(written, dict):
            return written
        ((kind, content),) = written.items()
        if kind == "node":
            return self._nodes[content]
        if kind == "tuple":
            return tuple(self.value(item) for item in content)
        if kind == "dict":
            return {self.value(key): self.value(item) for key, item in content}
        if kind == "size":
            return self._sizes.number(content[1], _NUMBER_TYPES[content[0]])
        if kind == "tensor":
            return self._tensor(*content)
        return _KINDS[kind][2](content)

    def _tensor(self, dtype: str, device: str, sizes: list[Any], strides: list[Any], requires_grad: bool) -> Tensor:
        """One of a kind is made, since torch thinks long about symbolic sizes, and the others are views of it."""
        kind = repr((dtype, sizes, strides))
        if kind not in self._kinds:
            shape, steps = ([self.value(size) for size in axes] for axes in (sizes, strides))
            self._kinds[kind] = torch.empty_strided(shape, steps, dtype=_dtype(dtype), device="meta")
        value = self._kinds[kind].detach().requires_grad_(requires_grad is True)
        return FakeTensor(self._mode, value, torch.device(device))


_NUMBER_TYPES = {"int": int, "float": float, "bool": bool}


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{text!r} is no type of a tensor")
    return found


def _named(kind: type) -> Callable[[str], Any]:
    def find(text: str) -> Any:
        found = getattr(torch, text.removeprefix("torch."))
        if not isinstance(found, kind):
            raise ArtifactError(f"{text!r} is no {kind.__name__}")
        return found

    return find


_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dtype": (torch.dtype, str, _dtype),
    "device": (torch.device, str, torch.device),
    "layout": (torch.layout, str, _named(torch.layout)),
    "memory_format": (torch.memory_format, str, _named(torch.memory_format)),
    "float": (float, str, float),
    "complex": (complex, str, complex),
}
"""Plain arguments by what they are called in the text: their type, how they are written, and how they are read."""


def _identifier(name: Any) -> str:
    """Code is generated from the names of a graph."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ArtifactError(f"{name!r} is no name of a node")
    return name


_OPERATORS = frozenset({"aten", "prims"})
"""Namespaces of operators that compute and do nothing else; those of others may do anything."""

_READS_FILES = frozenset({"from_file"})

_FUNCTIONS: dict[str, Any] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt",
            "le", "gt", "ge", "and_", "or_", "not_",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("trunc", "floor", "ceil", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum", "sym_ite")
    },
    "max": max,
    "min": min,
    "round": round,
}  # fmt: skip
"""What a graph computes with sizes."""

_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def _name_of(target: Any) -> str:
    if isinstance(target, OpOverload):
        if not _is_computation(target):
            raise Unwritable(f"it calls {target.name()}")
        return str(target)
    if target not in _NAMES:
        raise Unwritable(f"it calls {getattr(target, '__name__', target)}")
    return _NAMES[target]


def _operator(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload) if namespace in _OPERATORS else None
    if not isinstance(found, OpOverload) or not _is_computation(found):
        raise ArtifactError(f"it calls {name!r}, which is no operator that a capture may call")
    return found


def _is_computation(target: OpOverload) -> bool:
    """Whether an operator does nothing but return something: what TorchScript alone has may write files."""
    name = target.name()
    return (
        target.namespace in _OPERATORS
        and not target._schema.is_mutable
        and target.overloadpacket.__name__ not in _READS_FILES
        and torch._C._dispatch_has_kernel(name)
    )
