"""A lazy model lifted for export: its sizes, example inputs and prologue, converted for any set of decisions."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile import pass_pipelines
from lazy_compile.analysis.timestep_input import names_the_time
from lazy_compile.backends.onnx.conditionals import sink_branches
from lazy_compile.backends.onnx.convert import (
    all_outputs,
    convert,
    name_values,
    own_outputs,
    quiet,
)
from lazy_compile.backends.onnx.example import all_inputs, example_call
from lazy_compile.backends.onnx.fixed_reshapes import read_sizes_of
from lazy_compile.backends.onnx.free_sizes import Dynamic, FreeSizes
from lazy_compile.backends.onnx.metadata import KEY, Gating, InputSpec, OnnxMetadata, SlotSpec, first_line
from lazy_compile.backends.onnx.prologue import (
    PROLOGUE_KEY,
    drop_unread_inputs,
    hoisted_graph,
    make_prologue,
    without_prologue,
)
from lazy_compile.backends.onnx.rules import check_rules
from lazy_compile.backends.onnx.save import OPSETS
from lazy_compile.backends.onnx.sizes import ShapeRange, Size
from lazy_compile.backends.onnx.structure import check_structure
from lazy_compile.backends.onnx.weight_places import write_places
from lazy_compile.config import BatchRule, Group, check_group
from lazy_compile.errors import BackendError, ConfigError, import_optional
from lazy_compile.ir.program import Program, Role
from lazy_compile.ir.state_tensors import initial_value
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from lazy_compile.policies.schedule import StepTable
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.artifact import fingerprint
from lazy_compile.runtime.module import LazyGraph, LazyModule

if TYPE_CHECKING:
    from onnx_ir import Model, Value

logger = logging.getLogger("lazy_compile")


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks of an export."""

    lazy: LazyModule
    example_inputs: Mapping[str, Any] | Sequence[Any] | None
    gating: Gating
    group: Group | None
    predictors: bool | None
    invariants: tuple[str, ...]
    opset: int
    dynamic: Dynamic
    shapes: ShapeRange | None
    simplify: bool


@dataclass
class LiftedModel:
    """A lifted program and its sizes, ready to be converted for any set of decisions.

    Attributes:
        tensors: of the example call, with no free size of 1.
        free: the free sizes.
        fixed: the decisions of ``gating="schedule"``; None where a step brings them.
    """

    request: ExportRequest
    graph: LazyGraph
    lifted: Program
    tensors: Sequence[Tensor]
    free: FreeSizes
    leaders: tuple[int, ...]
    rule: BatchRule
    predictors: bool
    fixed: StepTable | None
    is_simplified: bool = False

    @property
    def lazy(self) -> LazyModule:
        return self.request.lazy

    @property
    def gating(self) -> Gating:
        return self.request.gating

    @property
    def table(self) -> StepTable:
        assert self.fixed is not None
        return self.fixed

    @classmethod
    def of(cls, request: ExportRequest, fixed_sizes: frozenset[str]) -> LiftedModel:
        lazy, gating, group = request.lazy, request.gating, request.group
        if not isinstance(lazy, LazyModule):
            raise ConfigError(f"export_onnx() takes what transform() returned; seen {type(lazy).__name__}")
        if request.opset not in OPSETS:
            raise ConfigError(f"opset is {request.opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
        if gating not in get_args(Gating):
            raise ConfigError(f"gating is {gating!r}; expected one of {', '.join(map(repr, get_args(Gating)))}")
        config = lazy.lazy_config
        check_group(group := config.group if group is None else group)
        import_optional("onnxscript", "onnx")
        if config.cache_dtype is not None or config.cache_device is not None:
            logger.warning(
                "cache_dtype and cache_device hold in PyTorch; the caches of the export have the model's type"
            )
        graph, tensors = example_call(lazy, request.example_inputs)
        _require_no_reading_of_time(lazy, graph)
        table = _step_table(lazy, len(graph.branches)) if gating == "schedule" else None
        graph = hoisted_graph(lazy, graph, request.invariants)
        leaders = graph.leaders(group)
        rule: BatchRule = "all_reuse" if config.batch_rule == "per_sample" else config.batch_rule
        predictors = lazy.policy.reads_gates if request.predictors is None else request.predictors
        predictors = gating == "predicate" or (gating == "input" and predictors)
        lift = LiftCacheSlots(
            config.reuse,
            rule,
            "predicate" if gating == "predicate" else "input",
            leaders,
            predictors,
            config.order,
        )
        lifted = without_prologue(pass_pipelines.lifting(lift).run(graph.program))
        free = FreeSizes.of(graph, tensors, request.dynamic, request.shapes, fixed_sizes, lifted.fake_inputs())
        return cls(request, graph, lifted, tensors, free, leaders, rule, predictors, table)

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """An example for every input that is no weight, with the sizes that the export is traced with."""
        tensors = [
            tensor if shape == tuple(tensor.shape) else torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            for tensor, shape in zip(self.tensors, self.free.traced_shapes(self.graph), strict=True)
        ]
        return dict(all_inputs(self.lazy, self.graph, self.lifted, tensors))

    @cached_property
    def prologue(self) -> Model | None:
        """What computes the inputs of role INVARIANT, converted; None if there are none."""
        program = self.graph.program
        if program.prologue is None:
            return None
        names = [item.name for item in program.inputs if item.role is Role.USER]
        tensors, shapes = [self.example[name] for name in names], [self.shapes[name] for name in names]
        return make_prologue(self.lazy.original, program, tensors, self.request.opset, shapes)

    @cached_property
    def shapes(self) -> dict[str, tuple[Size, ...]]:
        """Of every input that is no weight: numbers, and formulas over the free sizes."""
        roles = (Role.USER, Role.INVARIANT, Role.SLOT, Role.GATE)
        pairs = zip(self.lifted.inputs, self.lifted.fake_inputs(), strict=True)
        found = {item.name: fake for item, fake in pairs if item.role in roles}
        if not self.free.example:
            return {name: tuple(self.example[name].shape) for name in found}
        return {name: self.free.shape(fake) for name, fake in found.items()}

    @property
    def hoisted_from(self) -> tuple[str, ...]:
        """The user's inputs that the prologue reads."""
        return () if self.prologue is None else tuple(str(value.name) for value in self.prologue.graph.inputs)

    def make(self, mask: tuple[bool, ...], on_progress: OnProgress = no_progress) -> Model:
        """The model for one set of decisions; without a mask, the one with conditionals."""
        name = type(self.lazy.original).__name__
        passes = pass_pipelines.scheduled(mask) if mask else pass_pipelines.lowering()
        program = passes.run(self.lifted)
        on_progress("exporting to ONNX", 1, 4, "branches lowered")
        roles = (Role.USER, Role.INVARIANT, Role.SLOT, Role.GATE)
        inputs = [item.name for item in program.inputs if item.role in roles]
        example = [self.example[item] for item in inputs]
        model = convert(
            self.lazy.original, program, example, self.request.opset, [self.shapes[item] for item in inputs]
        )
        on_progress("exporting to ONNX", 2, 4, "operators converted")
        name_values(model, inputs, all_outputs(program))
        read_sizes_of(model, [item.name for item in program.inputs if item.role is Role.USER])
        conditionals = sink_branches(model)
        drop_unread_inputs(model, self.hoisted_from)
        metadata = self._metadata(program, model, mask, conditionals).with_policy(self.lazy.policy)
        model.metadata_props[KEY] = metadata.to_json()
        if not mask:  # the files of a set share their weights
            write_places(model, self.lazy.original)
        structure = check_structure(model)
        broken = (*structure.problems[: structure.if_nodes != structure.conditionals], *check_rules(model))
        if broken:
            raise BackendError(f"the exported {name} is not sound: {broken[0]}")
        for problem in structure.problems:
            logger.warning("the exported %s is right but not as lazy as it could be: %s", name, problem)
        on_progress("exporting to ONNX", 3, 4, "branches moved into If nodes")
        return model

    def _metadata(self, program: Program, model: Model, mask: tuple[bool, ...], conditionals: int) -> OnnxMetadata:
        parameters = inspect.signature(self.lazy.original.forward).parameters.values()
        named = all(item.kind not in (item.VAR_POSITIONAL, item.POSITIONAL_ONLY) for item in parameters)
        position = self.graph.timestep_position
        return OnnxMetadata(
            model=type(self.lazy.original).__name__,
            branches=program.branches,
            inputs=tuple(InputSpec(*item) for item in self._described(Role.USER)),
            outputs=tuple(own_outputs(program)),
            slots=tuple(
                SlotSpec(name, f"next_{name}", shape, dtype, initial_value(name))
                for name, shape, dtype in self._described(Role.SLOT)
            ),
            invariants=tuple(InputSpec(*item) for item in self._described(Role.INVARIANT)),
            prologue="" if self.prologue is None else self.prologue.metadata_props[PROLOGUE_KEY],
            reuse=self.lazy.lazy_config.reuse,
            batch_rule=self.rule,
            gating=self.gating,
            leaders=self.leaders,
            predictors=self.predictors,
            conditionals=conditionals,
            should_compute=mask,
            fingerprint=fingerprint(self.lazy.original),
            arguments=tuple(item.name for item in parameters if named and item.kind is item.POSITIONAL_OR_KEYWORD),
            timestep_input=None if position is None else self.graph.layout.names[position],
            output_spec=_dump(self.graph.captured.output_spec),
            total_macs=self.graph.total_macs,
            warmup_steps=self.lazy.lazy_config.warmup_steps,
            max_reuse_age=self.lazy.lazy_config.max_reuse_age,
            results=tuple(_result(value) for value in model.graph.outputs if not str(value.name).startswith("next_")),
            sizes=self.free.described(),
            conditions=self.free.conditions,
        )

    def _described(self, role: Role) -> list[tuple[str, tuple[Size, ...], str]]:
        """Name, shape and dtype of all inputs of one role that the lifted program has."""
        found = []
        for name in (item.name for item in self.lifted.inputs if item.role is role):
            tensor, shape = self.example[name], self.shapes[name]
            if role is Role.INVARIANT and tensor.is_complex():  # files hand these to each other as pairs
                tensor, shape = torch.view_as_real(tensor), (*shape, 2)
            found.append((name, shape, str(tensor.dtype).removeprefix("torch.")))
        return found

    def simplified(self, model: Model) -> Model | None:
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
        if names[0] != names[1] or check_structure(result) != check_structure(model):
            logger.warning("onnxsim moved operators of a branch; its result was left out")
            return None
        self.is_simplified = True
        return result


def _result(value: Value) -> InputSpec:
    """
    Raises:
        BackendError: a size of it does not follow from those of the inputs.
    """
    if value.shape is None or value.dtype is None:
        raise BackendError(f"the shape of {value.name} does not follow from those of the inputs")
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return InputSpec(str(value.name), shape, str(value.dtype.numpy()))


def _require_no_reading_of_time(lazy: LazyModule, graph: LazyGraph) -> None:
    of_time = [name for name in graph.guarded_inputs if name == graph.timestep_input or names_the_time(name)]
    if of_time:
        raise ConfigError(
            f"{type(lazy.original).__name__} reads the value of {of_time[0]} while it runs (by item(), float() or an "
            "if), so that a file would hold for one timestep alone; compute with the tensor instead"
        )
    if graph.guarded_inputs:
        logger.warning(
            "the exported %s is right only where it reads the same values from %s as from the example; export one file "
            "for each that you need",
            type(lazy.original).__name__, ", ".join(graph.guarded_inputs),
        )  # fmt: skip


def _step_table(lazy: LazyModule, branches: int) -> StepTable:
    """
    Raises:
        ConfigError: the policy fixes no reuse by the index of the step.
    """
    table = lazy.policy.step_table(branches)
    if table is None or (lazy.policy.steps is None and table.schedule.should_compute.all()):
        raise ConfigError(
            f"gating='schedule' fixes a schedule, the model's policy is {type(lazy.policy).__name__}; "
            "set lazy.policy = Scheduled(...), or take another gating"
        )
    return table


def _dump(spec: pytree.TreeSpec) -> str:
    """Empty for a return type that pytree cannot write down: the runner then returns a plain tuple."""
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError:
        return ""
