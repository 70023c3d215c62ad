"""Reshapes of free sizes without arithmetic: TensorRT builds no arm of an ``If`` that computes shapes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lazy_compile.errors import import_optional

if TYPE_CHECKING:
    from onnx_ir import Model, Node


def fix_reshapes(model: Model) -> int:
    """Give ``Reshape`` and ``Expand`` constant shapes where that says the same, in place; returns how many.

    ::

        %n = Shape(%x)[1]                         |
        %shape = Concat(%b, %n, 6, 32)            |
        %q = Reshape(%x, %shape)                  |   %q = Reshape(%x, [0, 0, 6, 32])

    1. ``Reshape`` copies a size (0) where input and output have it at the same place, and works out one other (-1).
    2. ``Expand`` keeps a size (1) where input and output have it at the same place, counted from the right.
    3. Shapes are compared by the formulas of their sizes. What is not known stays computed.
    """
    ir = import_optional("onnx_ir", "onnx")
    import numpy as np

    changed = 0
    for node in [node for node in model.graph if node.op_type in ("Reshape", "Expand") and node.domain == ""]:
        sizes = _constant_sizes(node)
        target = node.inputs[1]
        if sizes is None or target is None or target.const_value is not None:
            continue
        tensor = ir.tensor(np.array(sizes, dtype=np.int64), name=f"{node.outputs[0].name}.shape")
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)  # no size is 0, and 0 copies
        changed += 1
    _remove_dead(model)
    return changed


def read_sizes_of(model: Model, names: Collection[str]) -> None:
    """Read free sizes from the inputs of these names, in place, where torch has read them from any input that has them.

    Those of a cache are not known before the first step: a server begins with one element along each free axis.
    """
    ir = import_optional("onnx_ir", "onnx")
    places: dict[str, tuple[Any, int]] = {}
    for value in (value for value in model.graph.inputs if value.name in names):
        for axis, size in enumerate(_sizes(value) or ()):
            if isinstance(size, str):
                places.setdefault(size, (value, axis))
    for node in (node for node in model.graph if node.op_type == "Shape" and node.domain == ""):
        (read,) = node.inputs
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        if read is None or not read.is_graph_input() or read.name in names or start is None or end != start + 1:
            continue
        sizes = _sizes(read)
        place = None if sizes is None else places.get(sizes[start])
        if place is not None:
            node.replace_input_with(0, place[0])
            node.attributes["start"], node.attributes["end"] = (
                ir.AttrInt64(name, place[1] + more) for name, more in (("start", 0), ("end", 1))
            )


def _constant_sizes(node: Node) -> list[int] | None:
    source, result = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if source is None or result is None:
        return None
    if node.op_type == "Expand":
        pairs = zip(result, [1] * (len(result) - len(source)) + source, strict=True)
        kept = [size if isinstance(size, int) else 1 if size == own else None for size, own in pairs]
        return None if None in kept else [size for size in kept if size is not None]
    sizes, unknown = [], 0
    for place, size in enumerate(result):
        if isinstance(size, int):
            sizes.append(size)
        elif place < len(source) and source[place] == size:
            sizes.append(0)
        else:
            sizes.append(-1)
            unknown += 1
    return sizes if unknown <= 1 and 0 not in result else None


def _sizes(value: Any) -> list[Any] | None:
    """Numbers and formulas; None if a size is not known."""
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else sizes


def _remove_dead(model: Model) -> None:
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)


def only_computes_sizes(nodes: Sequence[Node]) -> set[Node]:
    """Nodes that read nothing but shapes of inputs, and constants: cheap, and engines want them outside of arms."""
    found: set[Node] = set()
    for node in nodes:
        read = [value for value in node.inputs if value is not None and value.const_value is None]
        whole = all(value.dtype is not None and value.dtype.name in ("INT64", "BOOL") for value in node.outputs)
        of_inputs = node.op_type == "Shape" and all(value.is_graph_input() for value in read)
        if whole and (of_inputs or (read and all(value.producer() in found for value in read))):
            found.add(node)
    return found
