"""Whether a captured graph does what the model does: both are called on the example, and their results compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.captured import Capture
from lazy_compile.capture.evaluation import comparable_evaluation, first_line
from lazy_compile.capture.restored_state import left_as_it_was
from lazy_compile.capture.restored_tensors import values_left_alone
from lazy_compile.errors import CaptureError
from lazy_compile.ir.operators import note_example_sizes, value_of
from lazy_compile.ir.program import module_state

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""How far a graph may lie from the model, relative to its largest result; what computes in fewer bits on the way counts
as of that type. On a CPU the two are equal bit for bit as a rule."""

TF32_TOLERANCE = 1e-3
"""The same for float32 on an accelerator, which may multiply it with 10 bits."""


@dataclass(frozen=True)
class ExampleResult:
    """What the model itself returns for the example.

    Attributes:
        leaves: the flat result; empty if the model was not called.
        reason: why it was not called; empty if it was.
        allowed: the largest relative error of a graph.
    """

    leaves: tuple[Any, ...] = ()
    reason: str = ""
    allowed: float = 0.0

    @classmethod
    def of(
        cls, model: nn.Module, layout: CallLayout, tensors: Sequence[Tensor], *, fetched: Collection[str] = ()
    ) -> ExampleResult:
        """Call the model. It also fills the tables that it keeps for later calls, wherever they are, with real tensors.

        Its inputs are copies, random numbers and buffers are put back, and what it notes in its own attributes is
        forgotten, so that the call leaves no trace in it. ``fetched`` are the paths of modules whose weights are
        brought when they are called.

        Raises:
            CaptureError: the model fails on the example.
        """
        state = [*model.parameters(), *model.buffers()]
        brought = {id(weight) for path in fetched for weight in model.get_submodule(path).parameters()}
        if any(_has_no_values(value) for value in [*tensors, *state] if id(value) not in brought):
            return cls(reason="not compared with the model: tensors on the meta device hold no values")
        with comparable_evaluation(model), left_as_it_was(model), values_left_alone(model):
            args, kwargs = layout.rebuild([tensor.detach().clone() for tensor in tensors])
            try:
                result = model(*args, **kwargs)
            except Exception as error:
                raise CaptureError(
                    f"{type(model).__name__} itself fails on the example: {first_line(error)}. Give it a call that the "
                    "original answers"
                ) from error
        register_dataclasses(result)
        leaves = tuple(pytree.tree_leaves(result))
        return cls(leaves, allowed=_allowed_error([*state, *leaves]))

    def mismatch(self, seen: Sequence[Any]) -> str:
        """How the result of a graph differs; empty if it is within the tolerance."""
        seen = pytree.tree_leaves(list(seen))
        if len(seen) != len(self.leaves):
            return f"its graph returns {len(seen)} values, and the model {len(self.leaves)}"
        for one, expected in zip(seen, self.leaves, strict=True):
            if not isinstance(expected, Tensor):
                continue
            if one.shape != expected.shape or one.dtype != expected.dtype:
                return f"its graph returns {_kind(one)}, and the model {_kind(expected)}"
            error = _relative_error(one, expected)
            if not error <= self.allowed:
                return f"its graph is off by {error:.1e} of the largest value (allowed is {self.allowed:.0e})"
        return ""

    def largest_difference(self, seen: Sequence[Any]) -> float:
        """In absolute terms, over all floating results."""
        pairs = zip(pytree.tree_leaves(list(seen)), self.leaves, strict=True)
        return max((_difference(a, b) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point()), default=0)


@dataclass(frozen=True)
class Verdict:
    """How a captured graph compares with the model.

    Attributes:
        mismatch: what it does otherwise; empty if it does the same, or could not be compared.
        difference: the largest one of a floating result, in absolute terms.
        is_exact: whether it was compared and returns the same bits.
    """

    mismatch: str = ""
    difference: float = 0.0
    is_exact: bool = False


def compare(found: Capture, model: nn.Module, tensors: Sequence[Tensor], expected: ExampleResult) -> Verdict:
    """Run a captured graph on the example, and hold what it returns against what the model returned."""
    if expected.reason:
        return Verdict()
    run = _NoteSizes(found.program.graph_module).run if found.has_open_sizes else found.program.graph_module
    with comparable_evaluation(model):
        try:
            seen = run(*found.program.bind(module_state(model), tensors))
        except Exception as error:
            return Verdict(first_line(error))
    if mismatch := expected.mismatch(seen):
        return Verdict(mismatch)
    difference = expected.largest_difference(seen)
    return Verdict(difference=difference, is_exact=difference == 0)


class _NoteSizes(fx.Interpreter):
    """Runs a program once to learn the sizes that depend on values: work is counted by the example call."""

    def run_node(self, n: fx.Node) -> Any:
        result, value = super().run_node(n), value_of(n)
        if isinstance(result, Tensor):
            note_example_sizes(value.shape, result.shape)
        elif isinstance(value, torch.SymInt):
            note_example_sizes([value], [result])
        return result


def register_dataclasses(result: Any) -> None:
    """Let torch take apart and rebuild results of these classes, as it does with those of named tuples."""
    for leaf in pytree.tree_leaves(result):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            kind = type(leaf)
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            register_dataclasses(result)
            return


def _allowed_error(values: Sequence[Any]) -> float:
    tensors = [value for value in values if isinstance(value, Tensor)]
    kinds = {tensor.device.type for tensor in tensors if not tensor.is_meta}
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    bounds = [TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE]
    if torch.float32 in dtypes and kinds - {"cpu"}:
        bounds.append(TF32_TOLERANCE)
    return max(bounds, default=0.0)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _relative_error(seen: Tensor, expected: Tensor) -> float:
    """The largest difference, per unit of the largest expected value; infinite where only one of them is finite."""
    if not expected.numel() or torch.equal(seen, expected):
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, seen.isfinite()):
        return float("inf")
    scale = _largest(expected[finite])
    return _difference(seen, expected) / scale if scale else _difference(seen, expected)


def _difference(seen: Tensor, expected: Tensor) -> float:
    """Of what is finite in both."""
    finite = seen.isfinite() & expected.isfinite()
    return _largest(seen[finite] - expected[finite])


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
