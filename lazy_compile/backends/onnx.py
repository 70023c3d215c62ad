"""Export to ONNX: a model in which every branch is an ``If``, with caches and gates as inputs and outputs."""

from __future__ import annotations

import inspect
import logging
import secrets
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lazy_compile.backends.onnx_metadata import KEY, InputSpec, OnnxMetadata, SlotSpec, first_line
from lazy_compile.backends.onnx_sink import DOMAIN, SELECT, sink_branches
from lazy_compile.backends.onnx_structure import MARK, check_structure
from lazy_compile.backends.onnx_structure import StructureReport as StructureReport
from lazy_compile.errors import BackendError, ConfigError, import_optional
from lazy_compile.lazy_branch import TAG, LazyBranch
from lazy_compile.module import LazyGraph, LazyModule
from lazy_compile.operators import size_hint, value_of
from lazy_compile.ops import state_names
from lazy_compile.pass_manager import PassManager
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots, initial_value
from lazy_compile.passes.lower_to_select import LowerToSelect
from lazy_compile.program import Program, Role, module_state
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.storage import atomic_path

if TYPE_CHECKING:
    from onnx_ir import Model, Value

logger = logging.getLogger("lazy_compile")

OPSETS = range(18, 23)
"""From 23 on the exporter keeps ``Attention`` whole, which TensorRT does not build inside an ``If``."""

EXTERNAL_BYTES = 2_000_000_000
"""Weights above this go to a file of their own: a protobuf message ends at 2 GiB."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Attributes:
        path: the model.
        opset: its opset.
        bytes: size of all its files.
        inputs: names of all inputs.
        outputs: names of all outputs.
        nodes: nodes of the main graph.
        branches: gated branches.
        if_nodes: conditionals; as many as branches.
        heavy_ops_inside: matrix products and convolutions that a reused branch skips.
        always_on: those that belong to no branch.
        heavy_ops_outside_if: those that should be skipped and are not; empty.
        seconds: how long the export took.
    """

    path: Path
    opset: int
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    branches: int
    if_nodes: int
    heavy_ops_inside: int
    always_on: int
    heavy_ops_outside_if: tuple[str, ...]
    seconds: float


def export_onnx(
    lazy: LazyModule,
    path: str | Path,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    opset: int = 20,
    on_progress: OnProgress = no_progress,
) -> OnnxReport:
    """Write a lazy model as ONNX, for the sizes of one example call.

    Inputs are the model's own, named by argument; ``cache_*`` slots; and one row of a gate table, ``gate_weight`` and
    ``gate_bias``. Outputs are ``output_0`` and so on, ``next_*`` for every slot, and ``compute_logits``. One file
    serves every policy: what a step decides is in the row that it is given. :class:`OnnxMetadata` describes all of it
    inside the file.

    Args:
        lazy: a captured lazy model. ``batch_rule="per_sample"`` is exported as ``"all_reuse"``.
        path: where to write. The file appears when it is complete and checked; weights of more than 2 GB stand beside
            it in ``<stem>.<random>.data``.
        example_inputs: arguments of one call, by name or by position: their sizes become fixed. None takes those that
            the model was captured with.
        opset: 18 to 22.
        on_progress: called after each stage.

    Raises:
        ConfigError: the opset is not supported, or nothing was captured yet.
        BackendError: the exporter does not know an operator of the model, or the result fails a check.
        ArtifactError: the file cannot be written.
        MissingDependencyError: ONNX is not installed.
    """
    start = time.perf_counter()
    if opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    import_optional("onnxscript", "onnx")
    graph, tensors = _example(lazy, example_inputs)
    rule = "all_reuse" if lazy.config.batch_rule == "per_sample" else lazy.config.batch_rule
    program = PassManager([LiftCacheSlots(lazy.config.reuse, rule), LowerToSelect()]).run(graph.program)
    on_progress("exporting to ONNX", 1, 4, "branches lowered")
    example = _all_inputs(lazy, graph, program, tensors)
    model = _convert(lazy, program, [tensor for _, tensor in example], opset)
    on_progress("exporting to ONNX", 2, 4, "operators converted")
    _name_values(model, [name for name, _ in example], program)
    sink_branches(model)
    model.metadata_props[KEY] = _metadata(lazy, graph, program, dict(example), rule).to_json()
    structure = check_structure(model)
    if structure.problems:
        raise BackendError(f"the exported {type(lazy.original).__name__} is not sound: {structure.problems[0]}")
    on_progress("exporting to ONNX", 3, 4, "branches moved into If nodes")
    size = _save(model, Path(path))
    on_progress("exporting to ONNX", 4, 4, "written")
    return OnnxReport(
        path=Path(path),
        opset=opset,
        bytes=size,
        inputs=tuple(str(value.name) for value in model.graph.inputs),
        outputs=tuple(str(value.name) for value in model.graph.outputs),
        nodes=len(model.graph),
        branches=structure.branches,
        if_nodes=structure.if_nodes,
        heavy_ops_inside=structure.heavy_ops_inside,
        always_on=structure.always_on,
        heavy_ops_outside_if=structure.heavy_ops_outside_if,
        seconds=time.perf_counter() - start,
    )


# The example call ---------------------------------------------------------------------------------------------------


def _example(lazy: LazyModule, inputs: Mapping[str, Any] | Sequence[Any] | None) -> tuple[LazyGraph, Sequence[Tensor]]:
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


def _all_inputs(
    lazy: LazyModule, graph: LazyGraph, program: Program, tensors: Sequence[Tensor]
) -> list[tuple[str, Tensor]]:
    """Name and example of every input that is not a parameter; nothing is computed to find the sizes."""
    observed, mode = _Observe(), FakeTensorMode()
    state = [mode.from_tensor(tensor) for tensor in lazy._state_of(graph)]
    with mode, torch.no_grad():
        graph.program.graph_module(*state, *(mode.from_tensor(tensor) for tensor in tensors), observed)
    remaining, example = iter(tensors), []
    for item, fake in zip(program.inputs, program.fake_inputs(), strict=True):
        if item.role is Role.USER:
            example.append((item.name, next(remaining)))
        elif item.role in (Role.SLOT, Role.GATE):
            if item.name.startswith(("cache_", "previous_")):
                _, branch, output = item.name.split("_")
                fake = observed.outputs[int(branch)][int(output)]
            example.append((item.name, torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)))
    names = [name for name, _ in example]
    if len(set(names)) < len(names):
        raise BackendError(f"an argument of {type(lazy.original).__name__} has the name of a slot; rename it: {names}")
    return example


# Conversion ---------------------------------------------------------------------------------------------------------


class _Exportable(nn.Module):
    """A flat program that finds its parameters in the original model, so that they keep their names."""

    def __init__(self, original: nn.Module, program: Program) -> None:
        super().__init__()
        self.original = original
        self.program = program

    def forward(self, *inputs: Tensor) -> Any:
        users = sum(item.role is Role.USER for item in self.program.inputs)
        values = self.program.bind(module_state(self.original), inputs[:users])
        with fx.traceback.preserve_node_meta():
            results = _Tracer(self.program.graph_module).run(*values, *inputs[users:])
        return tuple(result for result in results if isinstance(result, Tensor))


class _Tracer(fx.Interpreter):
    """Runs a flat program under export. Selects become ONNX nodes; an einsum becomes the products that it stands for,
    since ONNX has none in bfloat16 and TensorRT few."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.lazy_compile.select.default:
            condition, computed, reused, branch = self.fetch_args_kwargs_from_env(n)[0]
            return torch.onnx.ops.symbolic(
                f"{DOMAIN}::{SELECT}",
                (condition, computed, reused),
                {"branch": branch},
                dtype=computed.dtype,
                shape=computed.shape,
                version=1,
            )
        if n.target is torch.ops.aten.einsum.default:
            return n.target.decompose(*self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)


def _convert(lazy: LazyModule, program: Program, example: Sequence[Tensor], opset: int) -> Model:
    for node in program.graph.nodes:
        if TAG in node.meta:
            stack = node.meta.get("nn_module_stack") or {}
            node.meta["nn_module_stack"] = {**stack, MARK: (f"{MARK}.{node.meta[TAG]}", LazyBranch.__name__)}
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(_Exportable(lazy.original, program), tuple(example), strict=False)
            converted = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        raise BackendError(
            f"{type(lazy.original).__name__} cannot be converted to ONNX: {_cause(error)}; "
            "run it in PyTorch, or replace that operator in the model"
        ) from error
    assert converted is not None
    model = converted.model
    if model.opset_imports[""] != opset:
        raise BackendError(f"the exporter wrote opset {model.opset_imports['']}, not {opset}; ask for that one")
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        _, marked, rest = scopes.partition(f"'{MARK}.")
        node.metadata_props.clear()
        if marked:
            node.metadata_props[MARK] = rest.partition("'")[0]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
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


# Names, description, file --------------------------------------------------------------------------------------------


def _own_outputs(program: Program) -> list[str | None]:
    """Names of the model's own outputs by position; None for one that is no tensor."""
    results = program.graph.output_node().args[0]
    assert isinstance(results, Sequence)
    own = results[: len(results) - program.state_outputs]
    return [f"output_{index}" if isinstance(result, fx.Node) else None for index, result in enumerate(own)]


def _name_values(model: Model, inputs: Sequence[str], program: Program) -> None:
    """Give inputs and outputs their names, parameters those of the model, and everything else what is left."""
    ir = import_optional("onnx_ir", "onnx")
    graph = model.graph
    state = state_names(program)
    outputs = [name for name in _own_outputs(program) if name is not None]
    outputs += [*(f"next_{name}" for name in state[:-1]), state[-1]]
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
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}.value"
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


def _metadata(
    lazy: LazyModule, graph: LazyGraph, program: Program, example: Mapping[str, Tensor], rule: Any
) -> OnnxMetadata:
    def described(role: Role) -> list[tuple[str, tuple[int, ...], str]]:
        return [
            (item.name, tuple(example[item.name].shape), str(example[item.name].dtype).removeprefix("torch."))
            for item in program.inputs
            if item.role is role
        ]

    parameters = inspect.signature(lazy.original.forward).parameters.values()
    named = all(item.kind not in (item.VAR_POSITIONAL, item.POSITIONAL_ONLY) for item in parameters)
    position = graph.timestep_position
    return OnnxMetadata(
        model=type(lazy.original).__name__,
        branches=program.branches,
        inputs=tuple(InputSpec(*item) for item in described(Role.USER)),
        outputs=tuple(_own_outputs(program)),
        slots=tuple(
            SlotSpec(name, f"next_{name}", shape, dtype, initial_value(name))
            for name, shape, dtype in described(Role.SLOT)
        ),
        reuse=lazy.config.reuse,
        batch_rule=rule,
        arguments=tuple(item.name for item in parameters if named and item.kind is item.POSITIONAL_OR_KEYWORD),
        timestep_input=None if position is None else graph.layout.names[position],
        output_spec=_dump(graph.captured.output_spec),
        total_macs=graph.total_macs,
    )


def _dump(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError:
        return ""


def _save(model: Model, path: Path) -> int:
    """Write and check a temporary file, then give it its name. The weights' name is new each time, so an older model
    and its weights stay together until then."""
    ir, onnx = import_optional("onnx_ir", "onnx"), import_optional("onnx", "onnx")
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    external = sum(tensor.nbytes for tensor in weights) > EXTERNAL_BYTES
    data = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.data")
    try:
        with atomic_path(path) as temporary:
            ir.save(model, temporary, external_data=data.name if external else None)
            onnx.checker.check_model(str(temporary), full_check=True)
            size = temporary.stat().st_size
    except BaseException as error:
        data.unlink(missing_ok=True)
        if isinstance(error, onnx.checker.ValidationError | onnx.shape_inference.InferenceError):
            raise BackendError(
                f"the exported model is not valid ONNX: {first_line(error)}; try opset={OPSETS[-1]} (bfloat16 needs it), "
                "or another dtype"
            ) from error
        raise
    for older in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 8}.data"):
        if older != data:
            older.unlink(missing_ok=True)
    return size + (data.stat().st_size if external else 0)
