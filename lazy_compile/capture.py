"""From a module and example inputs to a :class:`Program`: a ladder of ways, each tried in turn and named."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lazy_compile.errors import CaptureError, LazyCompileError
from lazy_compile.operators import note_example_sizes, value_of
from lazy_compile.program import Program, Role


@dataclass(frozen=True)
class CallLayout:
    """The structure of a call: where its tensors go, and the value of everything that is not a tensor.

    Two calls of one layout differ only in their tensors. The layout is what a graph is specialised on.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallLayout, list[Tensor]]:
        """Split a call into its layout and its flat tensors."""
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        tensors = [leaf for _, leaf in paths if isinstance(leaf, Tensor)]
        leaves = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for _, leaf in paths)
        names = tuple(_argument_path(path) for path, leaf in paths if isinstance(leaf, Tensor))
        return cls(spec, leaves, names), tensors

    def differs_in_numbers(self, other: CallLayout) -> bool:
        """Whether the two are alike but for the values of Python numbers."""
        if self.spec != other.spec or self.names != other.names:
            return False
        changed = [pair for pair in zip(self.leaves, other.leaves, strict=True) if pair[0] != pair[1]]
        return bool(changed) and all(type(value) in (int, float) for pair in changed for value in pair)

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is _TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


class _TensorLeaf:
    def __repr__(self) -> str:
        return "Tensor"


_TENSOR = _TensorLeaf()


@dataclass(frozen=True)
class Capture:
    """A captured program and how it was obtained.

    Attributes:
        program: the raw program, before any pass.
        rung: the way that worked, for the report.
        attempts: one line for each way that was tried before and failed.
        output_spec: how to build the model's own return value from flat outputs.
    """

    program: Program
    rung: str
    attempts: tuple[str, ...]
    output_spec: pytree.TreeSpec
    _guards: CodeType | None
    _verdicts: dict[tuple[torch.Size, ...], bool] = field(default_factory=dict)

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program may be run on tensors of these shapes."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._verdicts:
            self._verdicts[shapes] = self._sizes_match(shapes) and self._guards_hold(tensors)
        return self._verdicts[shapes]

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


def capture(model: nn.Module, layout: CallLayout, tensors: Sequence[Tensor]) -> Capture:
    """Capture ``model`` as it runs in evaluation mode on a call like this one; sizes stay dynamic where it allows it.

    An example batch of 1 is repeated to 2 first, since export specialises the sizes 0 and 1.

    Raises:
        CaptureError: every rung failed; the message names the reason of the first.
    """
    attempts: list[str] = []
    doubled = _with_batch_of_two(tensors)
    for rung, export in _LADDER:
        for example in ([doubled] if doubled is not None else []) + [tuple(tensors)]:
            flat = _FlatModel(model, layout)
            try:
                with _quiet_evaluation(model):
                    exported = export(flat, example).run_decompositions({})
                program = Program.from_exported(exported, parameter_prefix="model.")
                program.name_users(layout.names)
            except LazyCompileError:
                raise
            except Exception as error:
                attempts.append(f"{rung}: {_first_line(error)}")
                continue
            output_spec = exported.call_spec.out_spec
            assert output_spec is not None
            captured = Capture(program, rung, tuple(attempts), output_spec, _compile_guards(exported))
            if captured.accepts(tensors):
                note_example_sizes(captured.fake_tensors, [tensor.shape for tensor in tensors])
                return captured
            attempts.append(f"{rung}: the graph of a batch of 2 serves no other")
    raise CaptureError(
        f"{type(model).__name__} could not be captured; {attempts[0].rstrip('.')}. Check that the example inputs run "
        "through the model, and that forward() does not branch on the values of tensors"
    )


class _FlatModel(nn.Module):
    """The model as a function of flat tensors."""

    def __init__(self, model: nn.Module, layout: CallLayout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    def forward(self, *tensors: Tensor) -> Any:
        args, kwargs = self.layout.rebuild(tensors)
        return self.model(*args, **kwargs)


def _export_dynamic(flat: nn.Module, example: tuple[Tensor, ...], strict: bool = False) -> ExportedProgram:
    shapes = (tuple(dict.fromkeys(range(tensor.dim()), Dim.AUTO) for tensor in example),)
    return torch.export.export(flat, example, dynamic_shapes=shapes, strict=strict)


def _export_dynamic_strict(flat: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    return _export_dynamic(flat, example, strict=True)


def _export_static(flat: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    return torch.export.export(flat, example, strict=False)


_LADDER: tuple[tuple[str, Callable[[nn.Module, tuple[Tensor, ...]], ExportedProgram]], ...] = (
    ("export, dynamic sizes", _export_dynamic),
    ("strict export, dynamic sizes", _export_dynamic_strict),
    ("export, fixed sizes", _export_static),
)


def _with_batch_of_two(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    batches = [t.shape[0] for t in tensors if t.dim() >= 3 and t.is_floating_point()]
    if not batches or batches[0] != 1:
        return None
    return tuple(t.expand(2, *t.shape[1:]).contiguous() if t.dim() > 0 and t.shape[0] == 1 else t for t in tensors)


def _compile_guards(exported: ExportedProgram) -> CodeType | None:
    guards = exported._guards_code
    if not guards:
        return None
    return compile(" and ".join(f"({guard})" for guard in guards), "<shape guards>", "eval")


@contextmanager
def _quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without export's chatter; the model's own flags come back afterwards."""
    training = [module for module in model.modules() if module.training]
    loggers = [logging.getLogger(f"torch.{name}") for name in ("_export", "export", "fx", "_subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    try:
        for module in training:
            module.training = False
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in training:
            module.training = True
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _argument_path(path: tuple[Any, ...]) -> str:
    """``"hidden_states"``, ``"args.0"`` or ``"added.resolution"`` for a leaf of ``(args, kwargs)``."""
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join(["args", *keys[1:]] if keys[0] == "0" else keys[1:])


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"[:300]
