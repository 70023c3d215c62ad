"""From selects to real conditionals: one ``If`` per group of branches, which holds everything that only it needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lazy_compile.backends.onnx.fixed_reshapes import only_computes_sizes
from lazy_compile.errors import BackendError, import_optional

if TYPE_CHECKING:
    from onnx_ir import Graph, Model, Node, Value

DOMAIN = "lazy_compile"
SELECT = "Select"

Arm = tuple[int, bool]
"""A conditional, and whether it is the arm that computes."""


def sink_branches(model: Model) -> int:
    """Replace the ``lazy_compile::Select`` nodes of each number by one ``If``, in place; returns how many there are.

    ::

        %q = MatMul(%modulated, %w_q)               |   %out = If(%should_compute)
        ...                                         |       then: %q = MatMul(%modulated, %w_q); ... ; %o
        %o = MatMul(%a, %w_o)                       |       else: Identity(%cache_0_0)
        %out = Select(%should_compute, %o, %cache)  |

    1. An arm takes every node whose results are read only by that arm, found in one sweep from the outputs back. So
       it holds all that can be lazy, whatever the operators are, and nothing that another part of the graph needs.
    2. What computes shapes from shapes stays outside: it costs nothing, and engines want it there.
    3. What an arm returns is made inside it: a value from outside, or one that it returns twice, passes an
       ``Identity``.
    4. Initializers stay in the main graph; arms read them from the outer scope. Those of an 8-bit floating type, which
       may not cross the border of an arm, become a constant of each of their readers.

    Raises:
        BackendError: the selects of one number do not share one condition.
    """
    graph = model.graph
    _give_eight_bits_to_readers(graph)
    selects: dict[int, list[Node]] = defaultdict(list)
    arms: dict[Arm, list[Node]] = defaultdict(list)
    for node, arm in _assign(graph).items():
        arms[arm].append(node)
    for node in graph:
        if _is_select(node):
            selects[_number_of(node)].append(node)
    for number, members in sorted(selects.items()):
        _replace(graph, number, members, arms[number, True], arms[number, False])
    graph.sort()
    model.opset_imports.pop(DOMAIN, None)
    return len(selects)


def _give_eight_bits_to_readers(graph: Graph) -> None:
    ir = import_optional("onnx_ir", "onnx")
    for name, value in list(graph.initializers.items()):
        if value.dtype is None or not value.dtype.name.startswith("FLOAT8"):
            continue
        for position, use in enumerate(list(value.uses())):
            own = _like(value, f"{name}.{position}")
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], outputs=[own])
            graph.insert_before(use.node, constant)
            use.node.replace_input_with(use.idx, own)
        del graph.initializers[name]


def _assign(graph: Graph) -> dict[Node, Arm]:
    """The arm of each node that can move into one, in graph order."""
    found: dict[Node, Arm] = {}
    sizes = only_computes_sizes(list(graph))
    for node in reversed(graph):
        if node in sizes or _is_select(node) or any(output.is_graph_output() for output in node.outputs):
            continue
        readers = {_arm_of(use.node, use.idx, found) for output in node.outputs for use in output.uses()}
        if len(readers) == 1 and (arm := readers.pop()) is not None:
            found[node] = arm
    return dict(reversed(found.items()))


def _arm_of(reader: Node, position: int, found: dict[Node, Arm]) -> Arm | None:
    if _is_select(reader):
        return (_number_of(reader), position == 1) if position in (1, 2) else None
    return found.get(reader)


def _replace(
    graph: Graph, number: int, selects: Sequence[Node], computing: Sequence[Node], reusing: Sequence[Node]
) -> None:
    ir = import_optional("onnx_ir", "onnx")
    conditions = {select.inputs[0] for select in selects}
    if len(conditions) != 1:
        raise BackendError(f"branch {number} has {len(conditions)} conditions; expected one for all its outputs")
    outputs = [_like(select.outputs[0], "") for select in selects]
    attributes = {
        "then_branch": _arm(graph, f"compute_{number}", computing, [select.inputs[1] for select in selects]),
        "else_branch": _arm(graph, f"reuse_{number}", reusing, [select.inputs[2] for select in selects]),
    }
    conditional = ir.Node(
        "", "If", list(conditions), [ir.AttrGraph(*item) for item in attributes.items()], outputs=outputs
    )
    conditional.name = f"lazy_branch_{number}"
    graph.insert_before(selects[0], conditional)
    for select, output in zip(selects, outputs, strict=True):
        select.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(selects, safe=True)


def _arm(graph: Graph, name: str, nodes: Sequence[Node], results: Iterable[Value | None]) -> Graph:
    ir = import_optional("onnx_ir", "onnx")
    graph.remove(nodes)
    inside, outputs = list(nodes), []
    for position, result in enumerate(results):
        assert result is not None
        if result.producer() not in nodes or result in outputs:
            copy = _like(result, f"{name}_{position}")
            inside.append(ir.Node("", "Identity", [result], outputs=[copy], name=f"{name}_{position}"))
            result = copy
        outputs.append(result)
    return ir.Graph([], outputs, nodes=inside, name=name)  # type: ignore[no-any-return]


def _like(value: Value, name: str) -> Value:
    ir = import_optional("onnx_ir", "onnx")
    return ir.Value(name=name or value.name, shape=value.shape, type=value.type)  # type: ignore[no-any-return]


def _is_select(node: Node) -> bool:
    return node.domain == DOMAIN and node.op_type == SELECT


def _number_of(select: Node) -> int:
    return select.attributes["conditional"].as_int()
