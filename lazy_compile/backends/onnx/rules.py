"""What TensorRT asks of an ``If`` so that it becomes a jump and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lazy_compile.errors import import_optional

if TYPE_CHECKING:
    from onnx_ir import Graph, Model, Node, Value

FUSED_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding"})
HALVES = ("FLOAT16", "BFLOAT16")


def check_rules(model: Model) -> tuple[str, ...]:
    """One line for each rule that a model breaks; empty if it keeps them all.

    1. Attention is decomposed inside an ``If``: the fused operator does not build there (NVIDIA/TensorRT #4739), and
       its parts are fused again where half precision allows it.
    2. A condition is a scalar of type bool.
    3. Both arms return values of equal shapes and types; others add work that depends on the data.
    4. What an arm returns is made inside it, by an ``Identity`` if by nothing else.
    5. No value of an 8-bit floating type crosses the border of an arm.
    6. What is quantized inside an arm is dequantized there too, and the other way round.
    7. No output of the model is an input or another output: a cache that is read and the one that is written are two
       buffers (NVIDIA/TensorRT #4681).
    8. A predicate is computed in float32.
    """
    graph = model.graph
    problems = []
    for node in (node for node in graph if node.op_type == "If"):
        arms = [attribute.as_graph() for attribute in node.attributes.values()]
        complaints = [
            *_attention(arms), *_condition(node), *_shapes(arms), *_returned(arms), *_eight_bits(node, arms),
            *_quantized(arms), *_predicate(node),
        ]  # fmt: skip
        problems += [f"{node.name}: {complaint}" for complaint in complaints]
    return (*problems, *_aliased(graph))


def _attention(arms: Sequence[Graph]) -> Iterator[str]:
    for node in (node for arm in arms for node in _nodes(arm)):
        if node.op_type in FUSED_ATTENTION:
            yield f"{node.op_type} stands inside an arm; expected its parts (opset 22 or older)"


def _condition(node: Node) -> Iterator[str]:
    condition = node.inputs[0]
    if _type(condition) != "BOOL" or condition is None or condition.shape is None or len(condition.shape):
        shape = None if condition is None or condition.shape is None else list(condition.shape)
        yield f"its condition is {_type(condition)}{shape}; expected BOOL[]"


def _shapes(arms: Sequence[Graph]) -> Iterator[str]:
    described = [[(_type(value), _shape(value)) for value in arm.outputs] for arm in arms]
    if described[0] != described[1]:
        pair = next((pair for pair in zip(*described, strict=False) if pair[0] != pair[1]), tuple(map(len, described)))
        yield f"its arms return {pair[0]} and {pair[1]}; expected equal types and shapes"
    elif any(shape is None for _, shape in described[0]):
        yield "the shape of what it returns is not known"


def _returned(arms: Sequence[Graph]) -> Iterator[str]:
    for arm in arms:
        inside = set(arm)
        for value in arm.outputs:
            if value.producer() not in inside:
                yield f"{arm.name} returns {value.name}, which is made outside; expected an Identity of it"


def _eight_bits(node: Node, arms: Sequence[Graph]) -> Iterator[str]:
    read = [value for arm in arms for value in _captured(arm)]
    for value in dict.fromkeys([*read, *node.outputs]):
        if _type(value).startswith("FLOAT8"):
            yield f"{value.name} crosses its border as {_type(value)}; convert it inside the arm"


def _quantized(arms: Sequence[Graph]) -> Iterator[str]:
    for arm in arms:
        inside = set(_nodes(arm))
        for node in inside:
            source = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
            if source is not None and source.op_type == "QuantizeLinear" and source not in inside:
                yield f"{source.name or source.op_type} quantizes outside what {arm.name} dequantizes"


def _predicate(node: Node) -> Iterator[str]:
    """Back from the condition to the activations: they enter through a cast, or are float32 themselves."""
    waiting, seen = [node.inputs[0]], set()
    while waiting:
        value = waiting.pop()
        producer = None if value is None else value.producer()
        if value is None or producer is None or producer in seen:
            continue
        seen.add(producer)
        if _type(value) in HALVES:
            yield f"its predicate is computed in {_type(value)} by {producer.name or producer.op_type}"
            return
        read = producer.inputs[0] if producer.inputs else None
        kind = _type(read)
        if read is not None and producer.op_type == "Cast" and kind in HALVES:  # behind it stand the activations
            source = read.producer()
            if source is not None and source.op_type.startswith("Reduce"):
                yield f"its predicate is reduced in {kind} by {source.name or source.op_type}"
                return
        elif producer.op_type != "ReduceMean" or kind != "FLOAT":
            waiting.extend(producer.inputs)


def _aliased(graph: Graph) -> Iterator[str]:
    seen = set(graph.inputs) | set(graph.initializers.values())
    for value in graph.outputs:
        if value in seen:
            yield f"output {value.name} is an input or another output; expected an Identity of it"
        seen.add(value)


def _captured(arm: Graph) -> Iterator[Value]:
    """Values from outside that an arm reads."""
    inside = {output for node in _nodes(arm) for output in node.outputs}
    for node in _nodes(arm):
        yield from (value for value in node.inputs if value is not None and value not in inside)


def _nodes(arm: Graph) -> Iterator[Node]:
    return iter(import_optional("onnx_ir", "onnx").traversal.RecursiveGraphIterator(arm))


def _type(value: Value | None) -> str:
    return "nothing" if value is None or value.dtype is None else str(value.dtype.name)


def _shape(value: Value) -> tuple[str, ...] | None:
    return None if value.shape is None else tuple(str(size) for size in value.shape)
