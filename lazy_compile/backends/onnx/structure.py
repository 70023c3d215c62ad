"""Whether an exported model can be lazy at all: every heavy operator of a branch must stand inside its ``If``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazy_compile.backends.onnx.metadata import OnnxMetadata, first_line
from lazy_compile.backends.onnx.sealed_file import read_proto
from lazy_compile.errors import ArtifactError, import_optional

if TYPE_CHECKING:
    from onnx_ir import Graph, Model, Node, Value

MARK = "lazy_compile.ir.branch"
"""``node.metadata_props[MARK]`` is the index of the branch whose body a node was exported from."""

HEAVY = frozenset(
    {
        "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention",
        "FusedMatMul", "FusedGemm", "FusedConv", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv",
        "MatMulNBits",
    }
)  # fmt: skip


@dataclass(frozen=True)
class StructureReport:
    """Where the heavy operators of a model stand.

    Attributes:
        branches: how many branches the model was exported with.
        conditionals: how many conditionals it was exported with: one for each branch, or for each group of them.
        if_nodes: how many its main graph has.
        heavy_ops_inside: heavy operators in the arms that compute.
        always_on: heavy operators outside that belong to no branch: embedders, adaLN, the final projection.
        heavy_ops_outside_if: names of heavy operators that belong to a branch and run at every step all the same.
        heavy_ops_when_reusing: names of heavy operators in the arms that reuse.
        empty_branches: names of conditionals whose computing arm holds no heavy operator.
    """

    branches: int
    conditionals: int
    if_nodes: int
    heavy_ops_inside: int
    always_on: int
    heavy_ops_outside_if: tuple[str, ...]
    heavy_ops_when_reusing: tuple[str, ...]
    empty_branches: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each way in which the model does not do what it should; empty if it is sound."""
        lines = []
        if self.if_nodes != self.conditionals:
            lines.append(f"{self.if_nodes} If nodes for {self.conditionals} branches")
        for text, names in (
            ("heavy operators of a branch run outside its If", self.heavy_ops_outside_if),
            ("heavy operators run while a branch is reused", self.heavy_ops_when_reusing),
            ("If nodes compute nothing heavy", self.empty_branches),
        ):
            if names:
                lines.append(f"{len(names)} {text}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        return tuple(lines)


def check_structure(model: str | Path | Model | Any) -> StructureReport:
    """Inspect a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.

    A heavy operator outside every ``If`` belongs to a branch if either of two independent signs says so:

    1. its mark: the export notes on each node the branch whose body it came from;
    2. the dataflow, without regard to marks: whatever reads its result, directly or through other nodes, stands in one
       arm of one ``If``.

    Raises:
        ArtifactError: there is no readable ONNX file at that path.
    """
    loaded = _load(model)
    graph = loaded.graph
    conditionals = [node for node in graph if node.op_type == "If"]
    served = _served(graph, conditionals)
    heavy = [node for node in graph if node.op_type in HEAVY]
    metadata = OnnxMetadata.parse(loaded.metadata_props)
    fixed = metadata.gating == "schedule"  # what is left of a branch belongs to the step
    outside = [node for node in heavy if (MARK in node.metadata_props and not fixed) or node in served]
    computing = {node: _heavy_in(node, "then_branch") for node in conditionals}
    return StructureReport(
        branches=len(metadata.branches),
        conditionals=metadata.conditionals,
        if_nodes=len(conditionals),
        heavy_ops_inside=sum(map(len, computing.values())),
        always_on=len(heavy) - len(outside),
        heavy_ops_outside_if=_names(outside),
        heavy_ops_when_reusing=_names(found for node in conditionals for found in _heavy_in(node, "else_branch")),
        empty_branches=_names(node for node, found in computing.items() if not found),
    )


def heavy_nodes(model: str | Path | Model | Any) -> dict[str, tuple[str, ...]]:
    """Names of the heavy operators by the name of the ``If`` that holds them; those in none stand under ``""``.

    Raises:
        ArtifactError: there is no readable ONNX file at that path.
    """
    graph = _load(model).graph
    places = {"": _names(node for node in graph if node.op_type in HEAVY)}
    for node in graph:
        if node.op_type == "If":
            places[_name(node)] = _names(_heavy_in(node, "then_branch"))
    return places


def _load(model: Any) -> Model:
    ir = import_optional("onnx_ir", "onnx")
    if isinstance(model, ir.Model):
        return model  # type: ignore[no-any-return]
    if not isinstance(model, str | Path):
        return ir.from_proto(model)  # type: ignore[no-any-return]
    read_proto(Path(model))
    try:
        return ir.load(model)  # type: ignore[no-any-return]
    except Exception as error:
        raise ArtifactError(f"cannot read {model} as ONNX ({first_line(error)}); export the model again") from error


def _served(graph: Graph, conditionals: Sequence[Node]) -> set[Node]:
    """Nodes of the main graph whose results are needed only in one arm of one conditional."""
    inside: dict[Node, tuple[Node, str]] = {}
    returned: dict[Value, tuple[Node, str]] = {}
    for node in conditionals:
        for attribute in node.attributes.values():
            arm = node, attribute.name
            inside.update(dict.fromkeys(_nodes(attribute.as_graph()), arm))
            returned.update(dict.fromkeys(attribute.as_graph().outputs, arm))
    results = set(graph.outputs)
    only: dict[Node, tuple[Node, str]] = {}
    for node in reversed(graph):
        readers = {inside.get(use.node) or only.get(use.node) for value in node.outputs for use in value.uses()}
        readers |= {returned[value] for value in node.outputs if value in returned}
        if len(readers) == 1 and not results & set(node.outputs) and (reader := readers.pop()) is not None:
            only[node] = reader
    return set(only)


def _heavy_in(conditional: Node, arm: str) -> list[Node]:
    return [node for node in _nodes(conditional.attributes[arm].as_graph()) if node.op_type in HEAVY]


def _nodes(graph: Graph) -> Iterator[Node]:
    """All nodes of a graph, those of its inner graphs too."""
    return iter(import_optional("onnx_ir", "onnx").traversal.RecursiveGraphIterator(graph))


def _names(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(map(_name, nodes))


def _name(node: Node) -> str:
    """Its name; for one without, the name that TensorRT gives it."""
    return node.name or f"node_of_{node.outputs[0].name}"
