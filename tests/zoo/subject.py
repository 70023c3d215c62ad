"""A zoo model under examination: the original, its lazy form, and the calls of a denoising run."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lazy_compile
from lazy_compile import AlwaysCompute, LazyConfig, LazyModule
from lazy_compile.analysis.batch_rows import batch_axis, batch_symbol
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.structure import check_structure
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.runtime.lazy_graph import LazyGraph
from support.toy_models import randomize
from zoo.registry import zoo

BATCH = 2

Call = dict[str, Any]


@dataclass
class Subject:
    """A model with random weights everywhere, so that no branch contributes nothing.

    Attributes:
        arguments: of one call in the order of the signature, with two rows where the model takes a batch.
        latents: the argument that holds them.
    """

    name: str
    model: nn.Module
    arguments: Call
    latents: str

    @cached_property
    def lazy(self) -> LazyModule:
        """Captured once; raises what ``transform`` raises."""
        return lazy_compile.transform(self.model, self.arguments)

    @cached_property
    def graph(self) -> LazyGraph:
        """The capture of the whole batch."""
        return self.lazy.capture(**self.arguments)

    @cached_property
    def exported(self) -> tuple[OnnxRunner, tuple[str, ...]]:
        """The model in ONNX Runtime, with ``If`` and every size free that can be, and what is wrong with the file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with plainly():
                export_onnx(self.fresh(), path, self.arguments)
            return OnnxRunner(path, threads=1), tuple(check_structure(path).problems)

    def fresh(self, **options: Any) -> LazyModule:
        """The lazy model without caches and statistics, and with these options."""
        self.lazy.lazy_config = LazyConfig(**options)
        self.lazy.policy = AlwaysCompute()
        return self.lazy

    def calls(self, steps: int) -> list[Call]:
        """A denoising run: time falls, the latents drift, what moves beside them fades, the conditions stay."""
        return [self._call(step / (2 * steps)) for step in range(steps)]

    def _call(self, done: float) -> Call:
        layout, tensors = CallLayout.of((), self.arguments)
        guarded, latents = self.graph.guarded_inputs, self.graph.latents
        beside = {} if latents is None else {layout.names[each.position]: each for each in latents.companions}
        generator = torch.Generator().manual_seed(1)
        moved = []
        for name, tensor in zip(layout.names, tensors, strict=True):
            if name == self.graph.timestep_input:
                tensor = (tensor * (1 - done)).to(tensor.dtype)
            elif name in beside:
                moving = beside[name].moving(tensor := tensor.clone(), beside[name].row_axis)
                moving *= 1 - done
            elif name.partition(".")[0] == self.latents and tensor.is_floating_point() and name not in guarded:
                drift = done * torch.randn(tensor.shape, generator=generator).to(tensor)
                if latents is not None and (rest := latents.staying(drift)) is not None:
                    rest.zero_()  # a mask, an image to begin from
                tensor = tensor + drift
            moved.append(tensor)
        return layout.rebuild(moved)[1]

    def row(self, call: Call, row: int) -> Call:
        """The call of one row alone: the tensors that the capture gives the batch size are cut along it, and a list of
        one item for each row at that item."""
        graph = self.graph
        symbol = batch_symbol(graph.captured.program)
        if symbol is None or any(isinstance(value, list) and len(value) == BATCH for value in call.values()):
            return row_of(call, row)
        layout, tensors = CallLayout.of((), call)
        fakes = graph.captured.fake_tensors
        return layout.rebuild([_cut(item, fake, symbol, row) for item, fake in zip(tensors, fakes, strict=True)])[1]


@lru_cache(maxsize=2)
def subject(name: str) -> Subject:
    """The zoo model of this name. The last two are kept: whoever asks sorts his questions by model."""
    torch.manual_seed(0)
    with plainly():
        model, arguments = zoo()[name]()
    ordered = {key: arguments[key] for key in inspect.signature(model.forward).parameters if key in arguments}
    assert len(ordered) == len(arguments)
    return Subject(name, randomize(model).eval().requires_grad_(False), ordered, next(iter(arguments)))


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[Call]) -> list[list[Tensor]]:
    """The tensors that each call returns. Third parties' warnings are theirs."""
    with plainly():
        return [tensors_of(answer(model, call)) for call in calls]


def answer(model: Any, call: Call) -> Any:
    """What a call returns. Some models write to the lists that they are given, so each call has its own."""
    return model(**pytree.tree_map(lambda leaf: leaf, call))


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _cut(tensor: Tensor, fake: Tensor, symbol: str, row: int) -> Tensor:
    """One row: of the axis that has as many, or of one into which rows and something else are folded, rows first."""
    axis = batch_axis(fake, symbol)
    if axis is not None:
        return tensor.narrow(axis, row, 1)
    sizes = [str(size).replace("(", "").replace(")", "").split("*") for size in fake.shape]
    folded = next((axis for axis, factors in enumerate(sizes) if symbol in factors), None)
    if folded is not None:
        return tensor.chunk(BATCH, folded)[row]
    return row_of(tensor, row) if tensor.dim() > 1 else tensor


def row_of(value: Any, row: int) -> Any:
    """One row of a batch of two: of tensors with two rows, of lists of such tensors or with one item for each row."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.dim() and value.shape[0] == BATCH else value
    if isinstance(value, dict):
        items = {key: row_of(item, row) for key, item in value.items()}
        return type(value)(**items) if is_dataclass(value) else type(value)(items)
    if isinstance(value, tuple):
        return tuple(row_of(item, row) for item in value)
    if isinstance(value, list):
        have_rows = all(isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == BATCH for item in value)
        return [row_of(item, row) for item in value] if have_rows or len(value) != BATCH else [value[row]]
    return value


@contextmanager
def plainly() -> Iterator[None]:
    """Without third parties' warnings, and without the fused kernels that torch's own layers call in eager mode only:
    a graph holds their parts, which are summed in another order."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
