"""Export to ONNX: a model in which every branch is an ``If``, with caches and gates as inputs and outputs."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile import pass_pipelines
from lazy_compile.analysis.timestep_input import names_the_time
from lazy_compile.backends.onnx.conditionals import sink_branches
from lazy_compile.backends.onnx.convert import (
    SpecialisedError,
    all_outputs,
    convert,
    name_values,
    own_outputs,
    quiet,
)
from lazy_compile.backends.onnx.example import all_inputs, example_call
from lazy_compile.backends.onnx.fixed_reshapes import read_sizes_of
from lazy_compile.backends.onnx.free_sizes import Dynamic, FreeSizes
from lazy_compile.backends.onnx.masks import MANIFEST, ScheduleVariants, SharedWeights
from lazy_compile.backends.onnx.metadata import BATCH, KEY, Gating, InputSpec, OnnxMetadata, SlotSpec, first_line
from lazy_compile.backends.onnx.prologue import (
    PROLOGUE_KEY,
    checked_names,
    drop_unread_inputs,
    hoisted_graph,
    make_prologue,
    prologue_macs,
    prologue_path,
    waiting_path,
    without_prologue,
)
from lazy_compile.backends.onnx.rules import check_rules
from lazy_compile.backends.onnx.save import OPSETS, put_in_place, save_model, save_pair
from lazy_compile.backends.onnx.sizes import ShapeRange, Size
from lazy_compile.backends.onnx.structure import StructureReport as StructureReport
from lazy_compile.backends.onnx.structure import check_structure
from lazy_compile.backends.onnx.weight_places import write_places
from lazy_compile.config import BatchRule, Group, check_group
from lazy_compile.errors import BackendError, ConfigError, import_optional
from lazy_compile.ir.program import Program, Role
from lazy_compile.ir.state_tensors import initial_value
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from lazy_compile.policies.schedule import CacheSchedule, StepTable
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.artifact import fingerprint
from lazy_compile.runtime.module import LazyGraph, LazyModule

if TYPE_CHECKING:
    from onnx_ir import Model, Value

logger = logging.getLogger("lazy_compile")


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Attributes:
        path: the model; with ``gating="schedule"`` a folder of models.
        opset: its opset.
        bytes: size of all its files.
        gating: who decides.
        masks: how many models there are, one for each set of decisions; 1 unless ``gating="schedule"``.
        inputs: names of all inputs.
        outputs: names of all outputs.
        nodes: nodes of the main graph.
        branches: gated branches.
        if_nodes: conditionals; one for each branch or group of branches.
        heavy_ops_inside: matrix products and convolutions that a reused branch skips.
        always_on: those that belong to no branch.
        heavy_ops_outside_if: those that should be skipped and are not; a warning names them.
        prologue: the model that computes what stays the same along a trajectory; None if nothing is hoisted.
        invariants: the inputs that it reads.
        hoisted_tensors: how many tensors it computes.
        hoisted_macs: multiply-accumulates that a step no longer spends, at the captured sizes.
        hoisted_share: of those of a dense step.
        sizes: the free sizes, and what they were in the example call.
        fixed_sizes: ``input.axis`` -> its size and the line of the model that fixes it, where that is known.
        simplified: whether onnxsim was run and its result kept.
        seconds: how long the export took.
    """

    path: Path
    opset: int
    bytes: int
    gating: Gating
    masks: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    branches: int
    if_nodes: int
    heavy_ops_inside: int
    always_on: int
    heavy_ops_outside_if: tuple[str, ...]
    prologue: Path | None
    invariants: tuple[str, ...]
    hoisted_tensors: int
    hoisted_macs: int
    hoisted_share: float
    sizes: dict[str, int]
    fixed_sizes: dict[str, str]
    simplified: bool
    seconds: float


def export_onnx(
    lazy: LazyModule,
    path: str | Path,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    gating: Gating = "predicate",
    group: Group | None = None,
    predictors: bool | None = None,
    invariants: Sequence[str] = (),
    dynamic: Dynamic = True,
    shapes: ShapeRange | None = None,
    opset: int = 20,
    simplify: bool = False,
    on_progress: OnProgress = no_progress,
) -> OnnxReport:
    """Write a lazy model as ONNX, for all sizes that its graph holds for.

    Free sizes have names: the rows of a call are its ``batch``, axes of the latents are
    ``frames``, ``height`` and ``width`` or ``tokens``, and others are called by an input and its axis, such as
    ``encoder_hidden_states_1``. Cache slots and all results follow from them by formulas. All rows of a call take one
    decision, as ``batch_rule`` says.

    Inputs are the model's own, named by argument, and ``cache_*`` slots; outputs are ``output_0`` and so on, and
    ``next_*`` for every slot. What else there is depends on who decides:

    - ``gating="predicate"``: the model reads its gates. ``gate_weight`` and ``gate_bias``, one row of a gate table, go
      in and ``compute_logits`` comes out. One file serves every policy: what a step decides is in its row.
    - ``gating="input"``: the host. One ``should_compute_*: bool`` for each gate goes in. Rows and logits are there too
      if the policy is ``Learned``, so that a step can be decided by the logits of the one before.
    - ``gating="schedule"``: nobody. The policy must be ``Scheduled``, or decide by the index of the step in another
      way; a folder is written with one model for each set of decisions, without any ``If``, and one copy of the
      weights.

    With ``invariants`` what they and the weights alone decide (keys and values of a text, its embedder) is written as
    a second model, the prologue: ``m.prologue.onnx`` beside ``m.onnx``, ``prologue.onnx`` in a folder. Its outputs
    ``invariant_0`` and so on are inputs of the first, which no longer takes an input that only the prologue reads.

    :class:`OnnxMetadata` describes all of it inside the file, with the policy of the model: a runner and an engine that
    is built from the file follow it unless they are given another one.

    Args:
        lazy: a captured lazy model. ``batch_rule="per_sample"`` is exported as ``"all_reuse"``.
        path: where to write. The file appears when it is complete and checked; weights of more than 2 GB stand beside
            it in ``<stem>.<random>.data``.
        example_inputs: arguments of one call, by name or by position: sizes that are not free are those of it. None
            takes those that the model was captured with.
        gating: who decides.
        group: branches under one gate, see :class:`~lazy_compile.config.LazyConfig`; None takes the model's own. A
            group is one ``If`` with the residual adds of its branches inside.
        predictors: whether ``gating="input"`` also takes rows and returns logits; None leaves it to the policy.
        invariants: names of inputs that stay the same along a trajectory. A runner computes the prologue when one
            starts, and again should one of them change. A warning says if there is nothing that it could compute.
        dynamic: which sizes are free: True for all that the graph and ONNX allow (a warning names one that is not,
            where the graph would allow it), False for none, or their names. An engine has the sizes of the example
            call, unless it is built for a range.
        shapes: the range of sizes to build engines for, kept in the file; sizes whose minimum is their maximum are
            fixed. It takes the place of ``dynamic``.
        opset: 18 to 22.
        simplify: also run onnxsim on the result, and keep what it makes if every ``If`` still holds what it held. It is
            off because it gains nothing measurable: a model of 12 branches ran at the same speed, and it fails on two
            of five families (PixArt, Wan) whose inner graphs read outer values. Run before the branches are moved into
            their arms it does harm: it fuses attention into an operator that TensorRT does not build inside an ``If``.
        on_progress: called after each stage.

    Raises:
        ConfigError: the model is not lazy or not captured yet, has no such input, or an option is not supported.
        BackendError: the exporter does not know an operator of the model, or the result fails a check.
        ArtifactError: the file cannot be written.
        MissingDependencyError: ONNX is not installed.
    """
    start = time.perf_counter()
    request = _Request(
        lazy, example_inputs, gating, group, predictors, checked_names(invariants), opset, dynamic, shapes, simplify
    )
    fixed: frozenset[str] = frozenset()
    failure = ""
    while True:
        export = _Export.of(request, fixed)
        try:
            report = export.write(Path(path), on_progress, start)
            if failure:
                logger.warning(
                    "the exported %s has fixed sizes (%s), for with free ones: %s",
                    type(lazy.original).__name__, ", ".join(sorted(fixed)), failure,
                )  # fmt: skip
            return report
        except BackendError as error:
            free = frozenset(export.free.example)
            if dynamic is not True or shapes is not None or not free:
                raise
            fixed |= error.names if isinstance(error, SpecialisedError) else free - {BATCH} or free
            failure = failure or str(error)


@dataclass(frozen=True)
class _Request:
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


def _write_set(
    export: _Export, schedule: CacheSchedule, folder: Path, on_progress: OnProgress
) -> tuple[Model, int, Path | None]:
    """A folder of models for a schedule: the last of them, how many there are, and their prologue.

    All lies under new names until the manifest takes the place of an older one.
    """
    with SharedWeights(folder) as weights:
        masks = ScheduleVariants.of(schedule.tied(export.leaders), folder, token=weights.token)
        for position, (mask, file) in enumerate(masks.files.items()):
            model = export.make(mask)
            weights.take(model)
            save_model(model, file, weights.places)
            on_progress("exporting to ONNX", position + 1, len(masks.files), "one model for each set of decisions")
        if export.prologue is None:
            masks.save(folder, [weights.name])
            return model, len(masks.files), None
        beside = prologue_path(folder / MANIFEST, "schedule").with_suffix(".onnx")
        waiting = waiting_path(beside, "schedule", export.prologue.metadata_props[PROLOGUE_KEY])
        weights.take(export.prologue)
        save_model(export.prologue, waiting, weights.places)
        masks.save(folder, [weights.name, waiting.name, beside.name])
        put_in_place(waiting, beside)
    return model, len(masks.files), beside


@dataclass
class _Export:
    """A lifted program and its sizes, ready to be converted for any set of decisions.

    Attributes:
        tensors: of the example call, with no free size of 1.
        free: the free sizes.
        fixed: the decisions of ``gating="schedule"``; None where a step brings them.
    """

    request: _Request
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
    def of(cls, request: _Request, fixed_sizes: frozenset[str]) -> _Export:
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

    def write(self, target: Path, on_progress: OnProgress, start: float) -> OnnxReport:
        """Convert and write everything."""
        gating = self.gating
        if gating == "schedule":
            model, count, beside = _write_set(self, self.table.schedule, target, on_progress)
            size = sum(file.stat().st_size for file in target.iterdir())
        else:
            model, count = self.make((), on_progress), 1
            model = (self.simplified(model) if self.request.simplify else None) or model
            beside = None if self.prologue is None else prologue_path(target, gating)
            size = save_pair(model, self.prologue, target, gating)
            on_progress("exporting to ONNX", 4, 4, "written")
        structure, hoisted = check_structure(model), prologue_macs(self.graph.program)
        return OnnxReport(
            path=target,
            opset=self.request.opset,
            bytes=size,
            gating=gating,
            masks=count,
            inputs=tuple(str(value.name) for value in model.graph.inputs),
            outputs=tuple(str(value.name) for value in model.graph.outputs),
            nodes=len(model.graph),
            branches=structure.branches,
            if_nodes=structure.if_nodes,
            heavy_ops_inside=structure.heavy_ops_inside,
            always_on=structure.always_on,
            heavy_ops_outside_if=structure.heavy_ops_outside_if,
            prologue=beside,
            invariants=self.hoisted_from,
            hoisted_tensors=0 if self.prologue is None else len(self.prologue.graph.outputs),
            hoisted_macs=hoisted,
            hoisted_share=hoisted / self.graph.total_macs,
            sizes=dict(self.free.example),
            fixed_sizes=dict(self.free.fixed),
            simplified=self.is_simplified,
            seconds=time.perf_counter() - start,
        )

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
