"""Export to ONNX: a model in which every branch is an ``If``, with caches and gates as inputs and outputs."""

from __future__ import annotations

import inspect
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lazy_compile.backends.onnx_convert import convert, name_values, own_outputs, quiet
from lazy_compile.backends.onnx_metadata import KEY, InputSpec, OnnxMetadata, SlotSpec, first_line
from lazy_compile.backends.onnx_sink import sink_branches
from lazy_compile.backends.onnx_structure import StructureReport as StructureReport
from lazy_compile.backends.onnx_structure import check_structure
from lazy_compile.errors import BackendError, ConfigError, import_optional
from lazy_compile.lazy_branch import LazyBranch
from lazy_compile.module import LazyGraph, LazyModule
from lazy_compile.operators import size_hint, value_of
from lazy_compile.pass_manager import PassManager
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots, initial_value
from lazy_compile.passes.lower_to_select import LowerToSelect
from lazy_compile.program import Program, Role
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.storage import atomic_path

if TYPE_CHECKING:
    from onnx_ir import Model

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
        heavy_ops_outside_if: those that should be skipped and are not; a warning names them.
        simplified: whether onnxsim was run and its result kept.
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
    simplified: bool
    seconds: float


def export_onnx(
    lazy: LazyModule,
    path: str | Path,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    opset: int = 20,
    simplify: bool = False,
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
        simplify: also run onnxsim on the result, and keep what it makes if every ``If`` still holds what it held. It is
            off because it gains nothing measurable: a model of 12 branches ran at the same speed, and it fails on two
            of five families (PixArt, Wan) whose inner graphs read outer values. Run before the branches are moved into
            their arms it does harm: it fuses attention into an operator that TensorRT does not build inside an ``If``.
        on_progress: called after each stage.

    Raises:
        ConfigError: the model is not lazy or not captured yet, or the opset is not supported.
        BackendError: the exporter does not know an operator of the model, or the result fails a check.
        ArtifactError: the file cannot be written.
        MissingDependencyError: ONNX is not installed.
    """
    start = time.perf_counter()
    if not isinstance(lazy, LazyModule):
        raise ConfigError(f"export_onnx() takes what transform() returned; seen {type(lazy).__name__}")
    if opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    import_optional("onnxscript", "onnx")
    graph, tensors = _example(lazy, example_inputs)
    if graph.guarded_inputs:
        logger.warning(
            "%s is right only where the model reads the same values from %s as from the example; export one file for "
            "each that you need",
            path, ", ".join(graph.guarded_inputs),
        )  # fmt: skip
    rule = "all_reuse" if lazy.lazy_config.batch_rule == "per_sample" else lazy.lazy_config.batch_rule
    program = PassManager([LiftCacheSlots(lazy.lazy_config.reuse, rule), LowerToSelect()]).run(graph.program)
    on_progress("exporting to ONNX", 1, 4, "branches lowered")
    example = _all_inputs(lazy, graph, program, tensors)
    model = convert(lazy.original, program, [tensor for _, tensor in example], opset)
    on_progress("exporting to ONNX", 2, 4, "operators converted")
    name_values(model, [name for name, _ in example], program)
    sink_branches(model)
    model.metadata_props[KEY] = _metadata(lazy, graph, program, dict(example), rule).to_json()
    structure = check_structure(model)
    if structure.if_nodes != structure.branches:
        raise BackendError(f"the exported {type(lazy.original).__name__} is not sound: {structure.problems[0]}")
    for problem in structure.problems:
        logger.warning("%s is right but not as lazy as it could be: %s", path, problem)
    simplified = _simplify(model, structure) if simplify else None
    model = simplified or model
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
        simplified=simplified is not None,
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
            if item.name.startswith(("cache_", "delta_")):
                _, branch, output = item.name.split("_")
                fake = observed.outputs[int(branch)][int(output)]
            example.append((item.name, torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)))
    names = [name for name, _ in example]
    if len(set(names)) < len(names):
        raise BackendError(f"an argument of {type(lazy.original).__name__} has the name of a slot; rename it: {names}")
    return example


# Description and file ------------------------------------------------------------------------------------------------


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
        outputs=tuple(own_outputs(program)),
        slots=tuple(
            SlotSpec(name, f"next_{name}", shape, dtype, initial_value(name))
            for name, shape, dtype in described(Role.SLOT)
        ),
        reuse=lazy.lazy_config.reuse,
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


def _simplify(model: Model, structure: StructureReport) -> Model | None:
    """What onnxsim makes of a model; None if it fails, or if the branches are no longer the same."""
    ir, onnxsim = import_optional("onnx_ir", "onnx"), import_optional("onnxsim", "onnx")
    description = model.metadata_props[KEY]
    try:
        with quiet():
            result: Model = ir.from_proto(onnxsim.simplify(ir.to_proto(model))[0])
    except Exception as error:
        logger.warning("onnxsim cannot simplify this model and was left out: %s", first_line(error))
        return None
    result.metadata_props.clear()
    result.metadata_props[KEY] = description
    names = [[value.name for value in (*item.graph.inputs, *item.graph.outputs)] for item in (model, result)]
    if names[0] != names[1] or check_structure(result) != structure:
        logger.warning("onnxsim moved operators of a branch; its result was left out")
        return None
    return result


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
                f"the exported model is not valid ONNX: {first_line(error)}; try opset={OPSETS[-1]} (bfloat16 needs "
                "it), or another dtype"
            ) from error
        raise
    for older in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 8}.data"):
        if older != data:
            older.unlink(missing_ok=True)
    return size + (data.stat().st_size if external else 0)
