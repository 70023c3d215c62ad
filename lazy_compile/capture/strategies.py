"""The ways to export a model, from the most general graph to the most special."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.comparison import register_dataclasses
from lazy_compile.capture.export_mode import ExportAid, every_shape_computed
from lazy_compile.capture.symbolic_numbers import sizes_stay_symbolic
from lazy_compile.capture.value_guards import StateGuards, StateTape, Tape, ValueGuards


@dataclass(frozen=True)
class CaptureStrategy:
    """One way to export a model.

    Attributes:
        dynamic: which sizes stay symbolic where the model allows it: all, that of the first axis, or none.
        strict: read the model's byte code instead of running it.
        reads_values: let the model read its inputs, and guard what it read.
        keeps_sizes: what its code makes of a size by ``int()`` or ``len()`` stays symbolic.
    """

    dynamic: Literal["sizes", "batch", "nothing"]
    strict: bool = False
    reads_values: bool = False
    keeps_sizes: bool = False

    @property
    def name(self) -> str:
        way = "strict export" if self.strict else "export"
        return f"{way}, fixed sizes" if self.dynamic == "nothing" else f"{way}, dynamic {self.dynamic}"

    @property
    def copies_repeats(self) -> bool:
        """Whether what a module does can be copied: not where values are read, or byte code."""
        return not self.strict and not self.reads_values

    def export(self, flat: FlatModel, example: Sequence[Tensor]) -> ExportedProgram:
        tapes = (Tape(example), StateTape(flat.model)) if self.reads_values else ()
        flat.aid = None if self.strict else ExportAid(type(flat.model).__name__, *tapes)
        flat.rows_of = inputs_with_rows(example) if self.dynamic != "nothing" else []
        axes = {"sizes": None, "batch": 1, "nothing": 0}[self.dynamic]
        shapes = tuple(dict.fromkeys(range(tensor.dim())[:axes], Dim.AUTO) for tensor in example)
        keeping = sizes_stay_symbolic(flat.model) if self.keeps_sizes else nullcontext()
        with keeping, every_shape_computed() if self.dynamic != "nothing" else nullcontext():
            return torch.export.export(flat, tuple(example), dynamic_shapes=(shapes,), strict=self.strict)


WITHOUT_FIXING = CaptureStrategy("sizes", keeps_sizes=True), CaptureStrategy("batch", strict=True)
"""For a model that makes a Python number of a size, which fixes it; strict export keeps that of the batch."""

STRATEGIES = (
    CaptureStrategy("sizes"),
    CaptureStrategy("sizes", strict=True),
    CaptureStrategy("sizes", reads_values=True),
    CaptureStrategy("batch", reads_values=True),
    CaptureStrategy("nothing", reads_values=True),
)


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


def with_batch_of_two(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    batches = [t.shape[0] for t in tensors if t.dim() >= 3 and t.is_floating_point()]
    if not batches or batches[0] != 1:
        return None
    return tuple(t.expand(2, *t.shape[1:]).contiguous() if t.dim() > 0 and t.shape[0] == 1 else t for t in tensors)


def inputs_with_rows(tensors: Sequence[Tensor]) -> list[int]:
    """Those as long as the first tensor of tokens or pixels; a model need not say itself that they go together."""
    rows = next((t.shape[0] for t in tensors if t.dim() >= 3 and t.is_floating_point()), None)
    return [index for index, t in enumerate(tensors) if t.dim() > 0 and t.shape[0] == rows]
