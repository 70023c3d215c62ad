"""From a flat program to an ONNX model in which a branch is still a set of selects."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from lazy_compile.backends.onnx.conditionals import DOMAIN
from lazy_compile.backends.onnx.fixed_reshapes import fix_reshapes
from lazy_compile.backends.onnx.formulas import note_symbol, read_text
from lazy_compile.backends.onnx.metadata import first_line
from lazy_compile.backends.onnx.operators import CONSTANT, Exportable
from lazy_compile.backends.onnx.sizes import Size, names_in
from lazy_compile.backends.onnx.structure import MARK
from lazy_compile.backends.onnx.weight_places import note_places
from lazy_compile.capture.export_mode import every_shape_computed
from lazy_compile.errors import BackendError, import_optional
from lazy_compile.ir.branch_arms import state_names
from lazy_compile.ir.lazy_branch import TAG, LazyBranch
from lazy_compile.ir.program import Program
from lazy_compile.ir.state_tensors import LOGITS

if TYPE_CHECKING:
    from onnx_ir import Model, Node, Value


class SpecialisedError(BackendError):
    """The exporter fixes sizes that were to be free."""

    def __init__(self, message: str, names: frozenset[str]) -> None:
        super().__init__(message)
        self.names = names


def convert(
    original: nn.Module,
    program: Program,
    example: Sequence[Tensor],
    opset: int,
    shapes: Sequence[Sequence[Size]],
) -> Model:
    """Convert a flat program, with selects as ``lazy_compile::Select`` and a mark on every node of a branch's body.

    Args:
        original: the model, whose weights it takes.
        program: what to convert.
        example: tensors for its inputs that are no weights.
        opset: of ONNX.
        shapes: their shapes; a size that is a formula stays free, and every size of the result is a formula too.

    Raises:
        SpecialisedError: a free size became fixed on the way.
        BackendError: an operator has no ONNX form, or not in this opset.
    """
    for node in program.graph.nodes:
        if TAG in node.meta:
            stack = node.meta.get("nn_module_stack") or {}
            node.meta["nn_module_stack"] = {**stack, MARK: (f"{MARK}.{node.meta[TAG]}", LazyBranch.__name__)}
    try:
        axes = tuple({axis: Dim.AUTO for axis, size in enumerate(item) if isinstance(size, str)} for item in shapes)
        with quiet(), torch.no_grad(), every_shape_computed() if any(axes) else nullcontext():
            flat = Exportable(original, program)
            exported = torch.export.export(flat, tuple(example), dynamic_shapes=(axes,), strict=False)
            formulas = _formulas_of(exported, shapes)
            converted = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, verbose=False)
    except SpecialisedError:
        raise
    except Exception as error:
        raise BackendError(
            f"{type(original).__name__} cannot be converted to ONNX: {_cause(error)}; "
            "run it in PyTorch, or replace that operator in the model"
        ) from error
    assert converted is not None
    model = converted.model
    if model.opset_imports[""] != opset:
        raise BackendError(f"the exporter wrote opset {model.opset_imports['']}, not {opset}; ask for that one")
    note_places(model, original, program)
    _reveal_constants(model)
    _without_bool_where(model)
    _name_sizes(model, formulas)
    if formulas:
        fix_reshapes(model)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        _, marked, rest = scopes.partition(f"'{MARK}.")
        node.metadata_props.clear()
        if marked:
            node.metadata_props[MARK] = rest.partition("'")[0]
    return model


def _formulas_of(exported: ExportedProgram, shapes: Sequence[Sequence[Size]]) -> dict[str, Any]:
    """What the symbols of an export are, by name."""
    inputs = set(exported.graph_signature.user_inputs)
    nodes = [node for node in exported.graph.find_nodes(op="placeholder") if node.name in inputs]
    formulas: dict[str, Any] = {}
    for node, shape in zip(nodes, shapes, strict=True):
        for size, wanted in zip(node.meta["val"].shape, shape, strict=False):
            if isinstance(wanted, int):
                continue
            if isinstance(size, int):
                raise SpecialisedError(f"the exporter fixes {wanted} to {size}", names_in(wanted))
            note_symbol(formulas, size.node.expr, wanted)
    return formulas


def _name_sizes(model: Model, formulas: Mapping[str, Any]) -> None:
    """Write every symbolic size as a formula over the free sizes; a shape that cannot be written so is left out."""
    ir = import_optional("onnx_ir", "onnx")
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
            sizes = [size if isinstance(size, int) else read_text(str(size), formulas) for size in value.shape]
            value.shape = None if None in sizes else ir.Shape(sizes)


def _reveal_constants(model: Model) -> None:
    ir = import_optional("onnx_ir", "onnx")
    hidden = [node for node in model.graph if node.domain == DOMAIN and node.op_type == CONSTANT]
    for node in hidden:
        (result,) = node.outputs
        tensor = ir.tensor(node.attributes["value"].as_float(), dtype=result.dtype, name=result.name)
        value = ir.Value(name=result.name, shape=tensor.shape, type=ir.TensorType(result.dtype), const_value=tensor)
        result.name = f"{result.name}.hidden"
        model.graph.register_initializer(value)
        result.replace_all_uses_with(value)
    model.graph.remove(hidden, safe=True)


def _without_bool_where(model: Model) -> None:
    """A choice between booleans becomes ``(c and x) or (not c and y)``: ONNX Runtime has no other."""
    ir = import_optional("onnx_ir", "onnx")

    def make(node: Node, part: str, operator: str, *inputs: Any) -> Value:
        name, boolean = f"{node.name}.{part}", ir.TensorType(ir.DataType.BOOL)
        result = ir.Value(name=name, type=boolean)
        made = ir.Node("", operator, inputs, outputs=[result], name=name, metadata_props=node.metadata_props)
        model.graph.insert_before(node, made)
        return result  # type: ignore[no-any-return]

    for node in list(model.graph):
        (chosen, *_) = node.outputs
        if node.op_type != "Where" or chosen.dtype != ir.DataType.BOOL:
            continue
        condition, first, second = node.inputs
        other = make(node, "other", "Not", condition)
        parts = make(node, "if", "And", condition, first), make(node, "else", "And", other, second)
        result = make(node, "chosen", "Or", *parts)
        result.shape = chosen.shape
        chosen.replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's chatter about its own deprecations and about packages that it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def own_outputs(program: Program) -> list[str | None]:
    """Names of the model's own outputs by position; None for one that is no tensor."""
    results = program.graph.output_node().args[0]
    assert isinstance(results, Sequence)
    own = results[: len(results) - program.state_outputs]
    return [f"output_{index}" if isinstance(result, fx.Node) else None for index, result in enumerate(own)]


def all_outputs(program: Program) -> list[str]:
    """Names of all outputs that are tensors: the model's own, the next value of each slot, the logits."""
    own = [name for name in own_outputs(program) if name is not None]
    return own + [name if name == LOGITS else f"next_{name}" for name in state_names(program)]


def name_values(model: Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs their names, parameters those of the model, and everything else what is left."""
    ir = import_optional("onnx_ir", "onnx")
    graph = model.graph
    seen: set[Value] = set(graph.inputs) | set(graph.initializers.values())
    for position, value in enumerate(graph.outputs):
        if value in seen:
            copy = ir.Value(name=outputs[position], shape=value.shape, type=value.type)
            graph.append(ir.Node("", "Identity", [value], outputs=[copy]))
            graph.outputs[position] = copy
        seen.add(value)
    taken = {*inputs, *outputs}
    for value in list(graph.initializers.values()):
        value.name = _parameter_name(value, taken | set(graph.initializers))
    used = {*taken, *graph.initializers}
    for node in graph:
        for value in node.outputs:
            name = str(value.name)
            while name in used:
                name = f"{name}.value"
            value.name = name
            used.add(name)
    for value, name in [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]:
        value.name = name
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.producer_name, model.producer_version = DOMAIN, None


def _parameter_name(value: Value, taken: Collection[str]) -> str:
    """The path of a parameter in the model; ``.folded`` behind it where the exporter has transposed or cast it."""
    name = str(value.name)
    folded = value.metadata_props.get("pkg.onnxscript.optimizer.folded_from", "").strip("[]'")
    if folded.startswith("original.") and "," not in folded:
        name = f"{folded}.folded"
    wanted = name.removeprefix("original.")
    return f"{value.name}.value" if wanted in taken and wanted != value.name else wanted
