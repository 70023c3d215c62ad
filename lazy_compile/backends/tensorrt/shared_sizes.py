"""Free sizes that the builder can follow through both arms of a conditional.

Both arms must return tensors of one shape, and what meets in an arm must have one size. The builder takes two sizes for
the same where both are read from the length of one tensor; that two numbers are equal it does not see.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.sizes import parsed
from lazy_compile.errors import import_optional

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Dims = Sequence[int | str]

END = 2**31 - 1
"""From here on the end of a slice is that of its tensor."""


def with_shared_sizes(path: Path, metadata: OnnxMetadata) -> bytes:
    """An exported model in which every conditional reads each free size from one tensor, without its external data.

    1. Of the tensors that its arms read, the first that is computed and has a size gives it. The others, caches among
       them, are reshaped to it, which changes nothing.
    2. A size is also known as the sum of others, as of the tokens of text and image together; and as what a condition
       of the file says it equals.
    3. Rows that two slices take apart are split: the length of a slice that ends at a free size is unknown to it.
    """
    onnx = import_optional("onnx", "onnx")
    model: ModelProto = onnx.load(str(path), load_external_data=False)
    dims = {value.name: _dims(value) for value in (*model.graph.input, *model.graph.value_info)}
    caches = {slot.input for slot in metadata.slots}
    weights = {weight.name: weight for weight in model.graph.initializer}
    equal = dict(_equalities(metadata.conditions))
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        arms = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        if node.op_type == "If":
            read = [name for name in _read_by(arms) if name not in weights and len(dims.get(name, ())) > 1]
            sizes = _Sizes(node.name, dims, equal)
            sizes.give([name for name in read if name not in caches])
            renamed = {name: reshaped for name in read if (reshaped := sizes.reshaped(name))}
            for inner in (inner for arm in arms for inner in arm.node):
                inner.input[:] = [renamed.get(name, name) for name in inner.input]
            for arm in arms:
                _split_rows(arm, weights, sizes.length)
            nodes += sizes.nodes
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    serialized: bytes = model.SerializeToString()
    return serialized


@dataclass
class _Sizes:
    """Where one conditional reads its free sizes.

    Attributes:
        owner: name of the conditional.
        dims: of all tensors outside.
        equal: formulas that a condition says are equal.
        nodes: that are to stand before the conditional.
        lengths: formula -> the tensor ``int64[1]`` that holds it.
    """

    owner: str
    dims: dict[str, Dims]
    equal: dict[str, str]
    nodes: list[NodeProto] = field(default_factory=list)
    lengths: dict[str, str] = field(default_factory=dict)
    givers: set[str] = field(default_factory=set)

    def give(self, names: Sequence[str]) -> None:
        """Take each size from the first tensor that has it, those with most free sizes first."""
        for name in sorted(names, key=lambda name: -sum(isinstance(size, str) for size in self.dims[name])):
            for axis, size in enumerate(self.dims[name]):
                if isinstance(size, str) and self.length(size) is None:
                    self.lengths[_canonical(size)] = self._add("Shape", [name], start=axis, end=axis + 1)
                    self.givers.add(name)

    def reshaped(self, name: str) -> str | None:
        """The tensor with its sizes as they are given; None if it gives them itself, or one of them is not given."""
        if name in self.givers or all(isinstance(size, int) for size in self.dims[name]):
            return None
        lengths = [self.length(size) for size in self.dims[name]]
        if None in lengths:
            return None
        return self._add("Reshape", [name, self._add("Concat", [str(length) for length in lengths], axis=0)])

    def length(self, size: int | str) -> str | None:
        """The tensor ``int64[1]`` that holds a size; None if it is not known."""
        if isinstance(size, int):
            return self._constant(size)
        text = _canonical(size)
        if text not in self.lengths:
            known = (self._sum(parsed(each)) for each in (text, self.equal.get(text)) if each and _is_formula(each))
            if (found := next((each for each in known if each is not None), None)) is None:
                return None
            self.lengths[text] = found
        return self.lengths[text]

    def _sum(self, formula: ast.expr) -> str | None:
        if (known := self.lengths.get(ast.unparse(formula))) is not None:
            return known
        if not (isinstance(formula, ast.BinOp) and isinstance(formula.op, ast.Add)):
            return None
        left, right = self._sum(formula.left), self._sum(formula.right)
        return None if left is None or right is None else self._add("Add", [left, right])

    def _constant(self, size: int) -> str:
        import numpy as np

        onnx = import_optional("onnx", "onnx")
        return self._add("Constant", [], value=onnx.numpy_helper.from_array(np.array([size], dtype=np.int64)))

    def _add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        onnx = import_optional("onnx", "onnx")
        name = f"{self.owner}.size.{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name


def _split_rows(arm: GraphProto, constants: Mapping[str, Any], length: Callable[[int | str], str | None]) -> None:
    """``x[:n]`` and ``x[n:]`` as one split, in place, where the length of the first part is known."""
    onnx = import_optional("onnx", "onnx")
    make, dims = onnx.helper.make_node, {value.name: _dims(value) for value in arm.value_info}

    def number(name: str) -> int | None:
        tensor = constants.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        values = onnx.numpy_helper.to_array(tensor).ravel()
        return int(values[0]) if len(values) == 1 else None

    parts: dict[tuple[str, int, str], dict[int, NodeProto]] = {}
    for node in arm.node:
        if node.op_type == "Slice" and len(node.input) == 5 and number(node.input[4]) == 1:
            rows, start, end, axes, _ = node.input
            if (axis := number(axes)) is None:
                continue
            if number(start) == 0 and end not in constants:
                parts.setdefault((rows, axis, end), {})[0] = node
            elif start not in constants and (number(end) or 0) >= END:
                parts.setdefault((rows, axis, start), {})[1] = node
    for (rows, axis, _), slices in parts.items():
        sizes = dims.get(slices[0].output[0]) if 0 in slices else None
        if sizes is None or (first := length(sizes[axis])) is None:
            continue
        name = f"{rows}.split"
        outputs = [slices[part].output[0] if part in slices else f"{name}.{part}" for part in (0, 1)]
        split = [
            make("Shape", [rows], [f"{name}.all"], start=axis, end=axis + 1),
            make("Sub", [f"{name}.all", first], [f"{name}.rest"]),
            make("Concat", [first, f"{name}.rest"], [f"{name}.sizes"], axis=0),
            make("Split", [rows, f"{name}.sizes"], outputs, axis=axis, name=name),
        ]
        place = min(list(arm.node).index(node) for node in slices.values())
        for node in slices.values():
            arm.node.remove(node)
        for offset, node in enumerate(split):
            arm.node.insert(place + offset, node)


def _read_by(arms: Collection[GraphProto]) -> list[str]:
    """Tensors from outside."""
    inner = {name for arm in arms for node in arm.node for name in node.output}
    return list(dict.fromkeys(name for arm in arms for node in arm.node for name in node.input if name not in inner))


def _equalities(conditions: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in conditions:
        formula = parsed(text)
        if isinstance(formula, ast.Compare) and isinstance(formula.ops[0], ast.Eq):
            left, right = ast.unparse(formula.left), ast.unparse(formula.comparators[0])
            yield left, right
            yield right, left


def _canonical(size: str) -> str:
    """A formula as it is compared; a size that is none stands for itself."""
    try:
        return ast.unparse(parsed(size))
    except ValueError:
        return size


def _is_formula(text: str) -> bool:
    try:
        parsed(text)
    except ValueError:
        return False
    return True


def _dims(value: Any) -> Dims:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
