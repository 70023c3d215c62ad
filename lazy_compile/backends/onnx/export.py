"""Export to ONNX: a model in which every branch is an ``If``, with caches and gates as inputs and outputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazy_compile.backends.onnx.convert import SpecialisedError
from lazy_compile.backends.onnx.free_sizes import Dynamic
from lazy_compile.backends.onnx.lifted_model import ExportRequest, LiftedModel
from lazy_compile.backends.onnx.masks import MANIFEST, ScheduleVariants, SharedWeights
from lazy_compile.backends.onnx.metadata import BATCH, Gating
from lazy_compile.backends.onnx.prologue import (
    PROLOGUE_KEY,
    checked_names,
    prologue_macs,
    prologue_path,
    waiting_path,
)
from lazy_compile.backends.onnx.save import put_in_place, save_model, save_pair
from lazy_compile.backends.onnx.sizes import ShapeRange
from lazy_compile.backends.onnx.structure import StructureReport as StructureReport
from lazy_compile.backends.onnx.structure import check_structure
from lazy_compile.config import Group
from lazy_compile.errors import BackendError
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import locked_folder

if TYPE_CHECKING:
    from onnx_ir import Model

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
    request = ExportRequest(
        lazy, example_inputs, gating, group, predictors, checked_names(invariants), opset, dynamic, shapes, simplify
    )
    fixed: frozenset[str] = frozenset()
    failure = ""
    while True:
        export = LiftedModel.of(request, fixed)
        try:
            report = _write(export, Path(path), on_progress, start)
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


def _write_set(
    export: LiftedModel, schedule: CacheSchedule, folder: Path, on_progress: OnProgress
) -> tuple[Model, int, Path | None, int]:
    """A folder of models for a schedule: the last of them, how many there are, their prologue, and the bytes of all.

    All lies under new names until the manifest takes the place of an older one.
    """
    with SharedWeights(folder) as weights:
        masks = ScheduleVariants.of(schedule.tied(export.leaders), folder, token=weights.token)
        for position, (mask, file) in enumerate(masks.files.items()):
            model = export.make(mask)
            weights.take(model)
            save_model(model, file, weights.places)
            on_progress("exporting to ONNX", position + 1, len(masks.files), "one model for each set of decisions")
        own = [*masks.files.values(), folder / weights.name]
        if export.prologue is None:
            size = _bytes_of(own)
            return model, len(masks.files), None, size + masks.save(folder, [weights.name])
        beside = prologue_path(folder / MANIFEST, "schedule").with_suffix(".onnx")
        waiting = waiting_path(beside, "schedule", export.prologue.metadata_props[PROLOGUE_KEY])
        weights.take(export.prologue)
        with locked_folder(folder):  # another export of the same model has a prologue of the same name
            save_model(export.prologue, waiting, weights.places)
            size = _bytes_of([*own, waiting])
            size += masks.save(folder, [weights.name, waiting.name, beside.name])
            put_in_place(waiting, beside)
    return model, len(masks.files), beside, size


def _bytes_of(files: Iterable[Path]) -> int:
    """To be asked before they are put in place: another export may put its own in the place of them then."""
    return sum(file.stat().st_size for file in files)


def _write(export: LiftedModel, target: Path, on_progress: OnProgress, start: float) -> OnnxReport:
    """Convert and write everything."""
    gating = export.gating
    if gating == "schedule":
        model, count, beside, size = _write_set(export, export.table.schedule, target, on_progress)
    else:
        model, count = export.make((), on_progress), 1
        model = (export.simplified(model) if export.request.simplify else None) or model
        beside = None if export.prologue is None else prologue_path(target, gating)
        size = save_pair(model, export.prologue, target, gating)
        on_progress("exporting to ONNX", 4, 4, "written")
    structure, hoisted = check_structure(model), prologue_macs(export.graph.program)
    return OnnxReport(
        path=target,
        opset=export.request.opset,
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
        invariants=export.hoisted_from,
        hoisted_tensors=0 if export.prologue is None else len(export.prologue.graph.outputs),
        hoisted_macs=hoisted,
        hoisted_share=hoisted / export.graph.total_macs,
        sizes=dict(export.free.example),
        fixed_sizes=dict(export.free.fixed),
        simplified=export.is_simplified,
        seconds=time.perf_counter() - start,
    )
