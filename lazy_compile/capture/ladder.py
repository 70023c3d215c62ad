"""From a module and example inputs to a :class:`Program`: a ladder of ways, each tried in turn and named."""

from __future__ import annotations

import keyword
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.comparison import ExampleResult, register_dataclasses
from lazy_compile.capture.evaluation import comparable_evaluation, first_line, quiet_evaluation
from lazy_compile.capture.export_mode import ExportAid
from lazy_compile.capture.refusals import require_capturable
from lazy_compile.capture.restored_state import left_as_it_was
from lazy_compile.capture.value_guards import StateGuards, StateTape, Tape, ValueGuards
from lazy_compile.errors import CaptureError, LazyCompileError
from lazy_compile.ir.operators import is_random, note_example_sizes, size_text, value_of
from lazy_compile.ir.program import Program, Role, module_state

logger = logging.getLogger("lazy_compile")


@dataclass(frozen=True)
class Capture:
    """A captured program and how it was obtained.

    Attributes:
        program: the raw program, before any pass.
        rung: the way that worked, for the report.
        attempts: one line for each way that was tried before and failed.
        output_spec: how to build the model's own return value from flat outputs.
        values: what the model read from its inputs on the way, and must read again for the program to be right.
        state: what it read from its weights and buffers.
        specialised_size: where the model made a Python number of a size, which this way of export fixes.
        fixing_lines: for axes of the user's tensors that the model fixes, by position and axis, the line that does.
    """

    program: Program
    rung: str
    attempts: tuple[str, ...]
    output_spec: pytree.TreeSpec
    values: ValueGuards = field(default_factory=ValueGuards)
    state: StateGuards = field(default_factory=StateGuards)
    specialised_size: str = ""
    fixing_lines: Mapping[tuple[int, int], str] = field(default_factory=dict)
    _guards: CodeType | None = None
    _verdicts: dict[tuple[torch.Size, ...], bool] = field(default_factory=dict)

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program may be run on these tensors."""
        return self.accepts_sizes(tensors) and self.state.hold() and self.values.hold(tensors)

    def accepts_sizes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program may be run on tensors of these shapes, whatever is in them."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._verdicts:
            self._verdicts[shapes] = self._sizes_match(shapes) and self._guards_hold(tensors)
        return self._verdicts[shapes]

    @cached_property
    def has_open_sizes(self) -> bool:
        """Whether a size depends on what is in a tensor, as that of ``x[mask]`` does."""
        values = [value_of(node) for node in self.program.graph.nodes]
        return any(free_unbacked_symbols(value) for value in values if isinstance(value, Tensor))

    @property
    def fake_tensors(self) -> list[Tensor]:
        """What the program knows of the user's tensors: types, and sizes that may be symbolic."""
        pairs = zip(self.program.placeholders, self.program.inputs, strict=True)
        return [value_of(node) for node, item in pairs if item.role is Role.USER]

    def _sizes_match(self, shapes: Sequence[torch.Size]) -> bool:
        bound: dict[str, int] = {}
        for fake, shape in zip(self.fake_tensors, shapes, strict=True):
            if fake.dim() != len(shape):
                return False
            for expected, seen in zip(fake.shape, shape, strict=True):
                if bound.setdefault(str(expected), seen) != seen or (isinstance(expected, int) and expected != seen):
                    return False
        return True

    def _guards_hold(self, tensors: Sequence[Tensor]) -> bool:
        if self._guards is None:
            return True
        arguments = {"tensors": tensors, "flat_args": tensors}  # as export and strict export name them
        return bool(eval(self._guards, {"L": arguments, "math": math, "torch": torch}))


@dataclass(frozen=True)
class Rung:
    """One way to export a model.

    Attributes:
        dynamic: which sizes stay symbolic where the model allows it: all, that of the first axis, or none.
        strict: read the model's byte code instead of running it.
        reads_values: let the model read its inputs, and guard what it read.
    """

    dynamic: Literal["sizes", "batch", "nothing"]
    strict: bool = False
    reads_values: bool = False

    @property
    def name(self) -> str:
        way = "strict export" if self.strict else "export"
        return f"{way}, fixed sizes" if self.dynamic == "nothing" else f"{way}, dynamic {self.dynamic}"

    def export(self, flat: FlatModel, example: Sequence[Tensor]) -> ExportedProgram:
        tapes = (Tape(example), StateTape(flat.model)) if self.reads_values else ()
        flat.aid = None if self.strict else ExportAid(*tapes)
        flat.rows_of = _inputs_with_rows(example) if self.dynamic != "nothing" else []
        axes = {"sizes": None, "batch": 1, "nothing": 0}[self.dynamic]
        shapes = tuple(dict.fromkeys(range(tensor.dim())[:axes], Dim.AUTO) for tensor in example)
        return torch.export.export(flat, tuple(example), dynamic_shapes=(shapes,), strict=self.strict)


WITHOUT_FIXING = Rung("batch", strict=True)
"""For a model that makes a Python number of a size, which fixes it unless export is strict."""

LADDER = (
    Rung("sizes"),
    Rung("sizes", strict=True),
    Rung("sizes", reads_values=True),
    Rung("batch", reads_values=True),
    Rung("nothing", reads_values=True),
)


def capture(model: nn.Module, layout: CallLayout, tensors: Sequence[Tensor], *, reads_values: bool = False) -> Capture:
    """Capture ``model`` as it runs in evaluation mode on a call like this one.

    1. The rungs of the ladder are tried in turn. Dynamic sizes come before fixed ones; a model that decides by the
       values of its inputs is captured for the values of this call, which are guarded.
    2. An example batch of 1 is repeated to 2 first, since export specialises the sizes 0 and 1.
    3. A model that writes ``len(x)``, or ``int(windows / (height * width / 16))``, fixes its sizes in a plain export; a
       strict one, of which only the batch is dynamic, is tried before that is accepted.
    4. With ``reads_values`` only those rungs are tried that read values: then no size depends on a value.
    5. A decision by a value that depends on inputs and weights ends the search: it could not be checked beforehand.
    6. The model is called on the example before, and the graph behind: a graph that returns something else is none.
       On the meta device, where there is nothing to compare, ``attempts`` says so.
    7. Whatever comes of it, the model is left as it was.

    Raises:
        CaptureError: every rung failed; the message names the decisive reason. Or something moves, packs or replaces
            the weights while the model runs, or the model fails on the example.
    """
    require_capturable(model)
    with left_as_it_was(model):
        expected = ExampleResult.of(model, layout, tensors)
        attempts = [expected.reason] if expected.reason else []
        failed = len(attempts)
        for rung in [rung for rung in LADDER if rung.reads_values or not reads_values]:
            found = _try_rung(rung, model, layout, tensors, expected, attempts)
            if found is not None and found.specialised_size and not rung.reads_values and _fixes_rows(found, tensors):
                attempts.append(f"{found.rung}: a size is fixed by {found.specialised_size}")
                return _try_rung(WITHOUT_FIXING, model, layout, tensors, expected, attempts) or found
            if found is not None:
                return found
    reason = attempts[failed].rstrip(".")
    advice = _advice(model, _TRACED if _OTHERWISE in reason else _CHECK)
    raise CaptureError(f"{type(model).__name__} could not be captured; {reason}. {advice}")


def _try_rung(
    rung: Rung,
    model: nn.Module,
    layout: CallLayout,
    tensors: Sequence[Tensor],
    expected: ExampleResult,
    attempts: list[str],
) -> Capture | None:
    """What one way of export gives; None if it fails, with the reason added to ``attempts``."""
    doubled = _with_batch_of_two(tensors)
    for example in ([doubled] if doubled is not None else []) + [tuple(tensors)]:
        flat = FlatModel(model, layout)
        label = f"{rung.name}, guarded values" if rung.reads_values else rung.name
        try:
            with quiet_evaluation(model), left_as_it_was(model):
                exported = rung.export(flat, example).run_decompositions({})
            program = Program.from_exported(exported, parameter_prefix="model.")
            program.name_users(layout.names)
        except LazyCompileError:
            raise
        except Exception as error:
            attempts.append(f"{label}: {first_line(error)}")
            if flat.unguardable_read:
                raise CaptureError(
                    f"{type(model).__name__} could not be captured: it decides by a value that depends on its "
                    f"weights, {flat.unguardable_read}. {_advice(model, _DECIDES)}"
                ) from error
            continue
        output_spec = exported.call_spec.out_spec
        assert output_spec is not None
        values, state = flat.values_read
        found = Capture(
            program, label if values or state.guards else rung.name, tuple(attempts), output_spec,
            values=values, state=state, specialised_size=flat.specialised_size, fixing_lines=flat.fixing_lines,
            _guards=_compile_guards(exported),
        )  # fmt: skip
        if found.accepts(tensors):
            for fake, tensor in zip(found.fake_tensors, tensors, strict=True):
                note_example_sizes(fake.shape, tensor.shape)
            if not (trouble := _why_not_equal(found, model, tensors, expected)):
                return found
            attempts.append(f"{label}: {trouble}")
            continue
        attempts.append(f"{label}: the graph of a batch of 2 serves no other")
    return None


def _why_not_equal(found: Capture, model: nn.Module, tensors: Sequence[Tensor], expected: ExampleResult) -> str:
    """What a program does otherwise than the model on the example; empty if it does the same."""
    if expected.reason:
        return ""
    run = _NoteSizes(found.program.graph_module).run if found.has_open_sizes else found.program.graph_module
    with comparable_evaluation(model):
        try:
            seen = run(*found.program.bind(module_state(model), tensors))
        except Exception as error:
            return first_line(error)
    mismatch = expected.mismatch(seen)
    if mismatch and any(map(is_random, found.program.graph.nodes)):
        logger.info("%s draws random numbers and is not compared: %s", type(model).__name__, mismatch)
        return ""
    if not mismatch and all(tensor.device.type == "cpu" for tensor in tensors):
        _warn_of_rounding(model, expected.largest_difference(seen))
    return mismatch


def _warn_of_rounding(model: nn.Module, difference: float) -> None:
    if difference > 0:
        logger.warning(
            "the captured %s differs from the original by up to %.1e: some of its operators were traced as others that "
            "round otherwise",
            type(model).__name__, difference,
        )  # fmt: skip


def _advice(model: nn.Module, usual: str) -> str:
    names = [name for name, _ in model.named_modules() if keyword.iskeyword(name.rpartition(".")[2])]
    if names:
        return (
            f"torch.export cannot write code for a module that is called like a word of Python, {names[0]!r}: rename it"
        )
    return usual


_DECIDES = "Move that decision out of forward(), or make it a tensor operation"
_OTHERWISE = "its graph "
_TRACED = (
    "What torch.export reads is not what the model runs: look for a function of torch.jit.script whose source has "
    "changed, and for values that are kept from earlier calls"
)
_CHECK = (
    "Check that the example inputs run through the model, and that forward() does not branch on the values of tensors"
)


class _NoteSizes(fx.Interpreter):
    """Runs a program once to learn the sizes that depend on values: work is counted by the example call."""

    def run_node(self, n: fx.Node) -> Any:
        result, value = super().run_node(n), value_of(n)
        if isinstance(result, Tensor):
            note_example_sizes(value.shape, result.shape)
        elif isinstance(value, torch.SymInt):
            note_example_sizes([value], [result])
        return result


class FlatModel(nn.Module):
    """The model as a function of flat tensors.

    Attributes:
        aid: what its calls to torch go through; None for none.
        rows_of: which tensors have a line for each row of the batch: their lengths are one symbol.
    """

    def __init__(self, model: nn.Module, layout: CallLayout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.aid: ExportAid | None = None
        self.rows_of: list[int] = []

    def forward(self, *tensors: Tensor) -> Any:
        for index in self.rows_of[1:]:
            torch._check(tensors[index].shape[0] == tensors[self.rows_of[0]].shape[0])
        args, kwargs = self.layout.rebuild(tensors)
        if self.aid is None:
            return self.model(*args, **kwargs)
        self.aid.begin(tensors, self.layout.stand_ins(tensors))
        with self.aid:
            result = self.model(*args, **kwargs)
            register_dataclasses(result)
            return self.aid.detached(result)

    @property
    def values_read(self) -> tuple[ValueGuards, StateGuards]:
        if self.aid is None or self.aid.inputs is None or self.aid.state is None:
            return ValueGuards(), StateGuards()
        return self.aid.inputs.guards(), self.aid.state.state_guards()

    @property
    def unguardable_read(self) -> str:
        return "" if self.aid is None else self.aid.stuck

    @property
    def specialised_size(self) -> str:
        return "" if self.aid is None else self.aid.fixed

    @property
    def fixing_lines(self) -> dict[tuple[int, int], str]:
        return {} if self.aid is None else self.aid.fixing_lines


def _with_batch_of_two(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    batches = [t.shape[0] for t in tensors if t.dim() >= 3 and t.is_floating_point()]
    if not batches or batches[0] != 1:
        return None
    return tuple(t.expand(2, *t.shape[1:]).contiguous() if t.dim() > 0 and t.shape[0] == 1 else t for t in tensors)


def _inputs_with_rows(tensors: Sequence[Tensor]) -> list[int]:
    """Those as long as the first tensor of tokens or pixels; a model need not say itself that they go together."""
    rows = next((t.shape[0] for t in tensors if t.dim() >= 3 and t.is_floating_point()), None)
    return [index for index, t in enumerate(tensors) if t.dim() > 0 and t.shape[0] == rows]


def _fixes_rows(found: Capture, tensors: Sequence[Tensor]) -> bool:
    """Whether a batch of this size has a graph of its own, as one of 1 often has whatever the model does."""
    rows = [index for index in _inputs_with_rows(tensors) if len(tensors[index]) > 1]
    return any(size_text(found.fake_tensors[index].shape[0]).isdigit() for index in rows)


def _compile_guards(exported: ExportedProgram) -> CodeType | None:
    guards = exported._guards_code
    if not guards:
        return None
    return compile(" and ".join(f"({guard})" for guard in guards), "<shape guards>", "eval")
