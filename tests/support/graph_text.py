"""Programs written and read as text.

::

    x: f32[B, N, 8]               an input of the model; capitals are symbolic sizes
    w: param f32[8, 8]            a parameter; `buffer` for a buffer
    n = sym_size.int(x, 1)        aten.sym_size.int; without an overload, aten's default
    y = linear(x, w)
    return y
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, ProgramInput, Role

DTYPES = {"f32": torch.float32, "f16": torch.float16, "i64": torch.int64, "bool": torch.bool}
HINTS = {"B": 2, "N": 16, "M": 12}
CONSTANTS = {name: getattr(torch, name) for name in ("float16", "float32", "preserve_format", "contiguous_format")}


def program(text: str) -> Program:
    """The program that ``text`` describes, with the fake values that a capture would have recorded."""
    graph, inputs, nodes, sizes = fx.Graph(), [], {}, {}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for line in _lines(text):
        if match := re.fullmatch(r"(\w+): (param |buffer )?(\w+)\[(.*)\]", line):
            name, state, dtype, shape = match.groups()
            lengths = [_size(mode, sizes, part.strip()) for part in shape.split(",") if part.strip()]
            nodes[name] = graph.placeholder(name)
            with mode:
                nodes[name].meta["val"] = torch.empty(lengths, dtype=DTYPES[dtype])
            inputs.append(ProgramInput(Role(state.replace("param", "parameter").strip()) if state else Role.USER, name))
        elif line.startswith("return "):
            graph.output(tuple(nodes[name.strip()] for name in line.removeprefix("return ").split(",")))
        else:
            name, _, call = line.partition(" = ")
            nodes[name] = _call(graph, mode, nodes, name, ast.parse(call, mode="eval").body)
    return Program(fx.GraphModule({}, graph), tuple(inputs))


def text(graph: fx.Graph) -> str:
    """The calls of a graph and what it returns, as :func:`program` reads them."""
    lines = [f"{node.name} = {_spelled(node)}" for node in graph.nodes if node.op in ("call_function", "call_module")]
    return "\n".join([*lines, "return " + ", ".join(map(str, graph.output_node().args[0]))])


def after(graph_pass: GraphPass, source: str | Program) -> tuple[str, bool]:
    """The text behind a pass, and whether the pass says that it changed something."""
    result = graph_pass(program(source) if isinstance(source, str) else source)
    return text(result.program.graph), result.modified


def calls(source: str) -> str:
    """A text without its input lines, to compare :func:`text` with."""
    return "\n".join(line for line in _lines(source) if not re.match(r"\w+: ", line))


def _lines(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if line.strip()]


def _size(mode: FakeTensorMode, sizes: dict[str, Any], part: str) -> Any:
    if part.isdigit():
        return int(part)
    if part not in sizes:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fake = mode.from_tensor(torch.empty(HINTS[part]), source=ConstantSource(part), symbolic_context=context)
        sizes[part] = fake.shape[0]
    return sizes[part]


def _call(graph: fx.Graph, mode: FakeTensorMode, nodes: dict[str, fx.Node], name: str, call: ast.expr) -> fx.Node:
    if isinstance(call, ast.Subscript):
        target, args, kwargs = operator.getitem, (call.value, call.slice), {}
    else:
        assert isinstance(call, ast.Call)
        path = ast.unparse(call.func)
        target = getattr(operator, path.removeprefix("operator."), None)
        if not path.startswith("operator."):
            packet, _, overload = path.partition(".")
            target = getattr(getattr(torch.ops.aten, packet), overload or "default")
        args, kwargs = tuple(call.args), {item.arg: item.value for item in call.keywords}
    args = tuple(_argument(item, nodes) for item in args)
    kwargs = {key: _argument(value, nodes) for key, value in kwargs.items()}
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    values = fx.map_arg((args, kwargs), lambda argument: argument.meta["val"])
    with mode, enable_python_dispatcher():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def _argument(expression: ast.expr, nodes: dict[str, fx.Node]) -> Any:
    return eval(ast.unparse(expression), {**CONSTANTS, **nodes})


def _spelled(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{node.args[0]}[{node.args[1]}]"
    arguments = [*map(_value, node.args), *(f"{key}={_value(value)}" for key, value in node.kwargs.items())]
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return str(target) if isinstance(target, str) else f"operator.{target.__name__}"


def _value(argument: Any) -> str:
    if isinstance(argument, str):
        return repr(argument)
    if isinstance(argument, Sequence):
        return "[" + ", ".join(map(_value, argument)) + "]"
    return str(argument).removeprefix("torch.")
