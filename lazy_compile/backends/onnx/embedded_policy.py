"""Models that need no host of ours: the policy inside the graph, and one input that starts a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.sizes import Size
from lazy_compile.errors import ConfigError, import_optional
from lazy_compile.ir.extrapolation import CLOCK, SLOPE
from lazy_compile.ir.state_tensors import GATE_BIAS, GATE_WEIGHT, decision_name
from lazy_compile.policies.gate_layout import GateLayout
from lazy_compile.policies.gate_table import GateRow, GateTable
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.schedule import StepTable

if TYPE_CHECKING:
    from onnx_ir import Model, Value

START = "START"
"""The input that starts a trajectory: ``bool[1]``, True at its first step and at no other."""

STEP, NEXT_STEP = "step", "next_step"
"""The slot that counts the steps of a trajectory, ``int64[1]``; a schedule is read by it."""


class _Editor:
    """Adds nodes to a graph, in front of or behind what is there."""

    def __init__(self, model: Model) -> None:
        self.ir = import_optional("onnx_ir", "onnx")
        self.graph = model.graph
        self.first = model.graph[0]

    def constant(self, array: Any, name: str) -> Value:
        value = self.ir.Value(name=name, const_value=self.ir.tensor(np.asarray(array), name=name))
        value.shape, value.type = self.ir.Shape(np.shape(array)), self.ir.TensorType(value.const_value.dtype)
        self.graph.register_initializer(value)
        return value  # type: ignore[no-any-return]

    def whole_numbers(self, prefix: str, **numbers: int) -> list[Value]:
        return [self.constant(np.int64(number), f"{prefix}.{name}") for name, number in numbers.items()]

    def new_input(self, name: str, dtype: str, shape: Sequence[int]) -> Value:
        value = self.ir.Value(name=name, shape=self.ir.Shape(shape), type=self.ir.TensorType(self.ir.DataType[dtype]))
        self.graph.inputs.append(value)
        return value  # type: ignore[no-any-return]

    def add(
        self, operator: str, inputs: Sequence[Value], name: str, dtype: str, shape: Sequence[Size], **given: Any
    ) -> Value:
        """A node, placed by :meth:`finish`; its one result is named like it."""
        ir = self.ir
        result = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))
        attributes = ir.convenience.convert_attributes(given)
        self.graph.insert_before(self.first, ir.Node("", operator, inputs, attributes, outputs=[result], name=name))
        return result  # type: ignore[no-any-return]

    def put_behind(self, value: Value, replacement: Value) -> None:
        """Whoever reads ``value`` reads ``replacement``, which is made of it."""
        value.replace_all_uses_with(replacement)
        producer = replacement.producer()
        assert producer is not None
        for index, given in enumerate(producer.inputs):
            if given is replacement:
                producer.replace_input_with(index, value)

    def finish(self) -> None:
        self.graph.sort()


def sizes_of(value: Value) -> list[Size]:
    """The shape of an input or output: numbers, and formulas over the free sizes."""
    sizes = value.shape if value.shape is not None else ()
    return [size if isinstance(size, int) else str(size.value) for size in sizes]


def add_start(model: Model) -> None:
    """Add the input :data:`START`, in place: where it holds every branch computes and time begins anew.

    ::

        %should_compute = LessOrEqual(...)       |  %forced = Or(%should_compute, %START)
        %out = If(%should_compute)               |  %out = If(%forced)
        %shift = f(%age, %gap, %moved)           |  %age' = Where(%START, inf, %age) ...

    Whatever the slots hold at the first step is not read, so a server may give them any finite value.
    """
    edit = _Editor(model)
    start = edit.new_input(START, "BOOL", [1])
    shape = edit.constant(np.zeros(0, np.int64), f"{START}.shape")
    scalar = edit.add("Reshape", [start, shape], f"{START}.scalar", "BOOL", [])
    for node in [node for node in edit.graph if node.op_type == "If"]:
        condition = node.inputs[0]
        assert condition is not None
        if condition.name and not condition.name.endswith(".forced"):
            edit.put_behind(condition, edit.add("Or", [condition, scalar], f"{condition.name}.forced", "BOOL", []))
    for slot in [value for value in edit.graph.inputs if value.name in CLOCK]:
        initial = edit.constant(np.float32(CLOCK[str(slot.name)]), f"{slot.name}.initial")
        size = sizes_of(slot)
        edit.put_behind(slot, edit.add("Where", [scalar, initial, slot], f"{slot.name}.started", "FLOAT", size))
    edit.finish()


def embed_policy(model: Model, metadata: OnnxMetadata, policy: Policy) -> None:
    """Put the rule that decides into the graph, in place; needs :data:`START`.

    1. A policy with a gate table, such as ``Learned(table)``, with ``gating="predicate"``: the rows become constants;
       the timestep input says which one is taken, as :meth:`~lazy_compile.policies.gate_table.GateTable.row` says, and
       its slopes.
    2. One that decides by the index of the step, such as ``Scheduled`` or ``EveryNth``, with ``gating="input"``: its
       table and slopes become constants, read by a slot :data:`STEP` that counts the steps. Steps beyond the end of
       the table compute, or follow the rows that it repeats.

    Raises:
        ConfigError: the policy and the gating do not go together, or the model has no timestep input.
    """
    policy.check(metadata.branches)
    gates, steps = policy.gate_table, policy.step_table(len(metadata.branches))
    if gates is not None and not policy.known_before_step and metadata.gating == "predicate":
        _embed_gates(_Editor(model), metadata, gates)
    elif steps is not None and metadata.gating == "input" and not metadata.predictors:
        _embed_schedule(_Editor(model), metadata, steps)
    else:
        raise ConfigError(
            f"{type(policy).__name__} cannot be put into a model that was exported with gating={metadata.gating!r}: "
            "export with gating='predicate' for Learned(...), with gating='input' and without predictors for a schedule"
        )


def _embed_schedule(edit: _Editor, metadata: OnnxMetadata, steps: StepTable) -> None:
    layout = GateLayout.of(metadata.branches, metadata.leaders)
    schedule = steps.schedule.of(layout.gates)
    beyond = np.ones((0 if steps.repeats_from is not None else 1, len(layout.gates)))
    rows = np.vstack([schedule.should_compute, beyond.astype(bool)])
    start = next(value for value in edit.graph.inputs if value.name == START)
    counted = edit.new_input(STEP, "INT64", [1])
    zero, one = edit.whole_numbers(STEP, zero=0, one=1)
    step = edit.add("Where", [start, zero, counted], f"{STEP}.now", "INT64", [1])
    edit.graph.outputs.append(edit.add("Add", [step, one], NEXT_STEP, "INT64", [1]))
    known = _row_of_step(edit, step, len(rows), steps.repeats_from)
    given = {str(value.name): value for value in edit.graph.inputs}
    for position, branch in enumerate(layout.gates):
        column = edit.constant(rows[:, position], f"{decision_name(branch)}.table")
        row = edit.add("Gather", [column, known], f"{decision_name(branch)}.row", "BOOL", [1])
        scalar = edit.constant(np.zeros(0, np.int64), f"{decision_name(branch)}.shape")
        decision = edit.add("Reshape", [row, scalar], f"{decision_name(branch)}.now", "BOOL", [])
        _replace_input(edit, given[decision_name(branch)], decision)
    if SLOPE in given:
        slopes = np.ones(schedule.should_compute.shape) if schedule.slopes is None else schedule.slopes
        column = edit.constant(np.vstack([slopes, beyond]).astype(np.float32), f"{SLOPE}.table")
        row = edit.add("Gather", [column, known], f"{SLOPE}.row", "FLOAT", [1, len(layout.gates)])
        size = edit.constant(np.array([len(layout.gates)]), f"{SLOPE}.shape")
        _replace_input(
            edit, given[SLOPE], edit.add("Reshape", [row, size], f"{SLOPE}.now", "FLOAT", [len(layout.gates)])
        )
    edit.finish()


def _row_of_step(edit: _Editor, step: Value, rows: int, repeats_from: int | None) -> Value:
    """``int64[1]``: the row of a table for a step that may lie beyond its end: the last, or one of those repeated."""
    if repeats_from is None:
        (last,) = edit.whole_numbers(STEP, last=rows - 1)
        return edit.add("Min", [step, last], f"{STEP}.known", "INT64", [1])
    first, period = edit.whole_numbers(STEP, first=repeats_from, period=rows - repeats_from)
    behind = edit.add("Sub", [step, first], f"{STEP}.behind", "INT64", [1])
    phase = edit.add("Mod", [behind, period], f"{STEP}.phase", "INT64", [1])
    repeated = edit.add("Add", [phase, first], f"{STEP}.repeated", "INT64", [1])
    early = edit.add("Less", [step, first], f"{STEP}.early", "BOOL", [1])
    return edit.add("Where", [early, step, repeated], f"{STEP}.known", "INT64", [1])


def _embed_gates(edit: _Editor, metadata: OnnxMetadata, gates: GateTable) -> None:
    given = {str(value.name): value for value in edit.graph.inputs}
    timestep = given.get(metadata.timestep_input or "")
    if timestep is None:
        raise ConfigError("this model has no timestep input, by which a row of the gate table could be found")
    if gates.trajectory is not None:
        raise ConfigError("these gates are of several trajectories, a model embeds those of one; calibrate for one")
    layout = GateLayout.of(metadata.branches, metadata.leaders)
    weight, bias = _rows(gates, layout)
    rows_of = {GATE_WEIGHT: weight, GATE_BIAS: bias}
    if SLOPE in given:
        slope = gates.slope
        rows_of[SLOPE] = np.ones_like(bias) if slope is None else slope[:, list(layout.gates)].float().numpy()
    sizes = sizes_of(timestep)
    now = edit.add("Cast", [timestep], "timestep.float", "FLOAT", sizes, to=1)
    if sizes:
        axes = edit.constant(np.arange(len(sizes), dtype=np.int64), "timestep.axes")
        now = edit.add("ReduceMax", [now, axes], "timestep.now", "FLOAT", [], keepdims=0)
    lower, upper, fraction = _locate(edit, now, gates)
    for name, rows in rows_of.items():
        table = edit.constant(rows, f"{name}.table")
        size = [int(rows.shape[1])]
        first = edit.add("Gather", [table, lower], f"{name}.lower", "FLOAT", size)
        second = edit.add("Gather", [table, upper], f"{name}.upper", "FLOAT", size)
        apart = edit.add("Sub", [second, first], f"{name}.apart", "FLOAT", size)
        part = edit.add("Mul", [apart, fraction], f"{name}.part", "FLOAT", size)
        _replace_input(edit, given[name], edit.add("Add", [first, part], f"{name}.now", "FLOAT", size))
    edit.finish()


def _rows(gates: GateTable, layout: GateLayout) -> tuple[Any, Any]:
    """``float32[K, width]`` and ``float32[K, G]``: of the gates that decide."""
    rows = [layout.row(GateRow(weight, bias)) for weight, bias in zip(gates.weight, gates.bias, strict=True)]
    return torch.stack([row.weight for row in rows]).numpy(), torch.stack([row.bias for row in rows]).numpy()


def _locate(edit: _Editor, now: Value, table: GateTable) -> tuple[Value, Value, Value]:
    """Rows around a timestep, and how far it lies from the first to the second: see ``GateTable.locate``."""
    knots = table.knots.numpy()
    count = len(knots)
    row = edit.constant(knots.astype(np.float32), "knots")
    apart = edit.add("Sub", [row, now], "knots.apart", "FLOAT", [count])
    distance = edit.add("Abs", [apart], "knots.distance", "FLOAT", [count])
    if table.interpolation == "nearest":
        nearest = edit.add("Neg", [distance], "knots.close", "FLOAT", [count])
        index = edit.add("ArgMax", [nearest], "knots.nearest", "INT64", [], axis=0, keepdims=0)
        return index, index, edit.constant(np.float32(0), "knots.fraction")
    # As many knots as lie ahead of this timestep have been passed: the last of them is the lower one.
    direction = -1.0 if count > 1 and knots[-1] > knots[0] else 1.0
    nothing, all_of_it, sign, least = (
        edit.constant(np.float32(value), f"knots.{name}")
        for name, value in (("nothing", 0.0), ("all", 1.0), ("sign", direction), ("least", 1e-12))
    )
    ahead = edit.add("Mul", [apart, sign], "knots.ahead", "FLOAT", [count])
    passed = edit.add("Greater", [ahead, nothing], "knots.passed", "BOOL", [count])
    each = edit.add("Cast", [passed], "knots.each", "INT64", [count], to=7)
    number = edit.add("ReduceSum", [each], "knots.number", "INT64", [], keepdims=0)
    zero, one, last = edit.whole_numbers("knots", zero=0, one=1, last=count - 1)
    upper = edit.add("Min", [number, last], "knots.upper", "INT64", [])
    before = edit.add("Sub", [number, one], "knots.before", "INT64", [])
    lower = edit.add("Max", [before, zero], "knots.lower", "INT64", [])
    low = edit.add("Gather", [ahead, lower], "knots.low", "FLOAT", [])
    high = edit.add("Gather", [ahead, upper], "knots.high", "FLOAT", [])
    length = edit.add("Sub", [low, high], "knots.length", "FLOAT", [])
    safe = edit.add("Max", [length, least], "knots.safe", "FLOAT", [])
    part = edit.add("Div", [low, safe], "knots.part", "FLOAT", [])
    return lower, upper, edit.add("Clip", [part, nothing, all_of_it], "knots.fraction", "FLOAT", [])


def _replace_input(edit: _Editor, old: Value, new: Value) -> None:
    old.replace_all_uses_with(new)
    edit.graph.inputs.remove(old)
