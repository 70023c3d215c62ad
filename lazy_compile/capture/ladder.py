"""From a module and example inputs to a :class:`Program`: a ladder of ways, each tried in turn and named."""

from __future__ import annotations

import keyword
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.export import ExportedProgram

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_folder import CaptureFolder
from lazy_compile.capture.captured import Capture
from lazy_compile.capture.comparison import ExampleResult, Verdict, compare
from lazy_compile.capture.evaluation import first_line, quiet_evaluation
from lazy_compile.capture.functional import functional
from lazy_compile.capture.opaque_modules import NotOneOperator, OpaqueModules, culprit, parent_of
from lazy_compile.capture.opaque_modules import scripted_modules as scripted
from lazy_compile.capture.refusals import eager_modules, require_capturable, unreadable
from lazy_compile.capture.region_copies import require_unwritten, with_copies
from lazy_compile.capture.regions import Regions
from lazy_compile.capture.restored_state import left_as_it_was
from lazy_compile.capture.restored_tensors import same_random_numbers
from lazy_compile.capture.rungs import (
    LADDER,
    WITHOUT_FIXING,
    FlatModel,
    Rung,
    inputs_with_rows,
    with_batch_of_two,
)
from lazy_compile.errors import CaptureError, LazyCompileError
from lazy_compile.ir.opaque import OpaqueCall
from lazy_compile.ir.operators import note_example_sizes, size_text
from lazy_compile.ir.program import Program

logger = logging.getLogger("lazy_compile")

_Found = tuple[ExportedProgram, Program, list[OpaqueCall], int]


def capture(
    model: nn.Module,
    layout: CallLayout,
    tensors: Sequence[Tensor],
    *,
    reads_values: bool = False,
    folder: CaptureFolder | None = None,
) -> Capture:
    """Capture ``model`` as it runs in evaluation mode on a call like this one.

    1. The rungs of the ladder are tried in turn. Dynamic sizes come before fixed ones; a model that decides by the
       values of its inputs is captured for the values of this call, which are guarded.
    2. An example batch of 1 is repeated to 2 first, since export specialises the sizes 0 and 1.
    3. A model that writes ``len(x)`` or ``int(size)`` fixes that size in a plain export; one in which these names mean
       something else, and a strict one if the batch is still fixed, are tried before that is accepted.
    4. With ``reads_values`` only those rungs are tried that read values: then no size depends on a value.
    5. A decision by a value that depends on inputs and weights could not be checked beforehand. Where it is taken in a
       module inside the model, that becomes *opaque*: one operator that calls it as it is. So does a module whose code
       no rung can follow (NumPy, a kernel that torch knows no shapes of); then the ladder is climbed again.
    6. The model is called on the example before, and the graph behind: a graph that returns something else is none.
       On the meta device, where there is nothing to compare, ``attempts`` says so.
    7. Modules that are alike are captured once and copied, see :mod:`lazy_compile.capture.regions`, if that can be done
       without changing the graph.
    8. With a ``folder``, one that is kept there is taken, if its graph returns on the example what the model returns;
       else the capture is kept there.
    9. Whatever comes of it, the model is left as it was.

    Raises:
        CaptureError: every rung failed; the message names the decisive reason. Or something moves, packs or replaces
            the weights while the model runs, or the model fails on the example.
    """
    require_capturable(model)
    rungs = [rung for rung in LADDER if rung.reads_values or not reads_values]
    with left_as_it_was(model):
        kept = None if folder is None else folder.entries(model, layout, tensors, reads_values)
        expected = ExampleResult.of(model, layout, tensors, fetched=eager_modules(model))
        if expected.reason and (reason := unreadable(model)):
            raise CaptureError(reason)
        search = _Search(model, layout, tensors, expected)
        if kept is not None and (known := kept.find(search.verdict_on)) is not None:
            return known
        while (found := search.climb(rungs)) is None:
            if not search.look_away():
                raise search.refusal()
        found.forget_operators()
        if kept is not None:
            kept.keep(found)
    return found


@dataclass
class _Search:
    """A climb of the ladder, and what was learned from those before.

    Attributes:
        attempts: one line for each way that failed.
        opaque: the modules that are not looked into.
        error: what the last export failed with; None if it was the comparison.
        unguardable_read: where the model decided by a value that could not be checked beforehand; empty if it did not.
        size_of_two: where it made a Python number of a size of a batch of two, whose graph then served no other.
        copying: whether modules that are alike are captured once.
    """

    model: nn.Module
    layout: CallLayout
    tensors: Sequence[Tensor]
    expected: ExampleResult
    attempts: list[str] = field(default_factory=list)
    error: Exception | None = None
    unguardable_read: str = ""
    size_of_two: str = ""
    copying: bool = True
    _failed_first: str = ""

    def __post_init__(self) -> None:
        self.opaque = OpaqueModules(self.model, eager_modules(self.model))
        if self.expected.reason:
            self.attempts.append(self.expected.reason)
        elif self.opaque:
            self._learn(self.opaque)

    def climb(self, rungs: Sequence[Rung]) -> Capture | None:
        """The capture of the first rung that works; None if none does."""
        for rung in rungs:
            if rung.strict and self.opaque:
                continue
            found = self._try(rung)
            if found is None and (self.unguardable_read or self._scripted()):
                return None
            if found is None:
                continue
            if (found.specialised_size or self.size_of_two) and not rung.reads_values and not self.opaque:
                return self._without_fixing(found)
            return found
        return None

    def _without_fixing(self, found: Capture) -> Capture:
        """Another capture of a model that makes a Python number of a size, if it leaves more sizes free."""
        keeping, strict = WITHOUT_FIXING
        self._note(f"{found.rung}: a size is fixed by {found.specialised_size or self.size_of_two}")
        other = self._try(keeping)
        if other is not None and other.fixed_axes < found.fixed_axes:
            found = other
        if self._fixes_rows(found):
            return self._try(strict) or found
        return found

    def look_away(self) -> bool:
        """Make the module that the climb failed in opaque, or the one around it; whether there is one."""
        paths = self._not_understood()
        while paths and not self.expected.reason:
            opaque = self.opaque
            for path, reason in paths.items():
                opaque = opaque.with_module(path, reason)
            try:
                self._learn(opaque)
            except NotOneOperator as error:
                self._note(str(error))
                paths = {around: reason} if (around := parent_of(self.model, error.path)) else {}
                continue
            self.opaque, self.unguardable_read = opaque, ""
            return True
        return False

    def _learn(self, opaque: OpaqueModules) -> None:
        opaque.learn(self.layout, self.tensors)
        logger.info("%s: %s, since %s", type(self.model).__name__, opaque, next(reversed(opaque.reasons.values())))

    def _not_understood(self) -> dict[str, str]:
        """The modules that the last climb failed in, and why; empty if it was the model itself."""
        if _OTHERWISE in self.attempts[-1]:
            return self._scripted()
        path = culprit(self.model, self.error)
        while path and path in self.opaque.reasons:
            path = parent_of(self.model, path)
        if self.unguardable_read:
            reason = f"it decides by a value that depends on its weights, {self.unguardable_read}"
        else:
            reason = self.attempts[-1].partition(": ")[2].rstrip(".")
        return {path: reason} if path else {}

    def _scripted(self) -> dict[str, str]:
        """Where a graph does otherwise than the model, the modules whose code is not what runs."""
        if not self.attempts or _OTHERWISE not in self.attempts[-1]:
            return {}
        found = {path: f"it calls {name}, which torch.jit compiled" for path, name in scripted(self.model).items()}
        return {} if "" in found or found.keys() <= self.opaque.reasons.keys() else found

    def refusal(self) -> CaptureError:
        name = type(self.model).__name__
        if self.unguardable_read:
            reason = f"it decides by a value that depends on its weights, {self.unguardable_read}"
            return CaptureError(f"{name} could not be captured: {reason}. {_advice(self.model, _DECIDES)}")
        reason = self._failed_first.rstrip(".")
        advice = _advice(self.model, _TRACED if _OTHERWISE in reason else _CHECK)
        return CaptureError(f"{name} could not be captured; {reason}. {advice}")

    def _note(self, attempt: str) -> None:
        self._failed_first = self._failed_first or attempt
        self.attempts.append(attempt)

    def _try(self, rung: Rung) -> Capture | None:
        """What one way of export gives; None if it fails, with the reason added to ``attempts``."""
        doubled = with_batch_of_two(self.tensors)
        for example in ([doubled] if doubled is not None else []) + [tuple(self.tensors)]:
            label = f"{rung.name}, guarded values" if rung.reads_values else rung.name
            found = self._export(rung, label, example)
            if found is None:
                if self.unguardable_read:
                    return None
            elif not found.accepts(self.tensors):
                self._note(f"{label}: the graph of a batch of 2 serves no other")
                self.size_of_two = found.specialised_size
            else:
                verdict = self.verdict_on(found)
                if not (trouble := self._trouble(found, verdict)):
                    return replace(found, is_exact=verdict.is_exact)
                if found.copies:
                    logger.info("%s: %s; its repeated modules are captured one by one", label, trouble)
                    self.copying = False
                    return self._try(rung)
                self._note(f"{label}: {trouble}")
        return None

    def verdict_on(self, found: Capture) -> Verdict:
        """How a capture compares with the model on the example, whose sizes it learns."""
        for fake, tensor in zip(found.fake_tensors, self.tensors, strict=True):
            note_example_sizes(fake.shape, tensor.shape)
        return compare(found, self.model, self.tensors, self.expected)

    def _trouble(self, found: Capture, verdict: Verdict) -> str:
        """What a capture does otherwise than the model; empty if it does the same, or draws random numbers."""
        name = type(self.model).__name__
        if verdict.mismatch and found.is_random:
            logger.info("%s draws random numbers and is not compared: %s", name, verdict.mismatch)
            return ""
        if not verdict.mismatch and verdict.difference and all(tensor.device.type == "cpu" for tensor in self.tensors):
            logger.warning(
                "the captured %s differs from the original by up to %.1e: some of its operators were traced as others "
                "that round otherwise", name, verdict.difference,
            )  # fmt: skip
        return verdict.mismatch

    def _export(self, rung: Rung, label: str, example: Sequence[Tensor]) -> Capture | None:
        flat = FlatModel(self.model, self.layout)
        try:
            exported, program, called, copies = self._program(rung, flat, example)
            program.name_users(self.layout.names)
        except LazyCompileError:
            raise
        except Exception as error:
            self._note(f"{label}: {first_line(error)}")
            self.error, self.unguardable_read = error, flat.unguardable_read
            return None
        output_spec = exported.call_spec.out_spec
        assert output_spec is not None
        values, state = flat.values_read
        name = label if values or state.guards else rung.name
        return Capture(
            program, f"{name}, {self.opaque}" if self.opaque else name, tuple(self.attempts), output_spec,
            values=values, state=state, specialised_size=flat.specialised_size, opaque=tuple(dict.fromkeys(called)),
            fixing_lines=flat.fixing_lines, copies=copies,
            guards=tuple(exported._guards_code or ()),
        )  # fmt: skip

    def _program(self, rung: Rung, flat: FlatModel, example: Sequence[Tensor]) -> _Found:
        """What an export gives, as a graph, the opaque modules in it, and how many of the others are copies."""
        copying = self.copying and rung.copies_repeats and not self.opaque
        regions = Regions.of(self.model) if copying else Regions(self.model)
        try:
            with same_random_numbers():
                return self._program_with(regions, rung, flat, example)
        except LazyCompileError:
            raise
        except Exception as error:
            if not regions.are_used:
                raise
            logger.info("%s is captured module by module: %s", type(self.model).__name__, first_line(error))
            self.copying = False
            return self._program_with(Regions(self.model), rung, flat, example)

    def _program_with(self, regions: Regions, rung: Rung, flat: FlatModel, example: Sequence[Tensor]) -> _Found:
        with (
            quiet_evaluation(self.model),
            left_as_it_was(self.model),
            self.opaque.installed() as called,
            regions.installed(lambda: flat.aid),
        ):
            exported = rung.export(flat, example)
            require_unwritten(exported, regions)
            exported = functional(exported)
        program = Program.from_exported(exported, parameter_prefix="model.")
        return exported, with_copies(program, regions), called, regions.copies

    def _fixes_rows(self, found: Capture) -> bool:
        """Whether a batch of this size has a graph of its own, as one of 1 often has whatever the model does."""
        rows = [index for index in inputs_with_rows(self.tensors) if len(self.tensors[index]) > 1]
        return any(size_text(found.fake_tensors[index].shape[0]).isdigit() for index in rows)


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
