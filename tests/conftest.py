"""Lazy models that many tests share, compiled once for each process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.onnx._internal.exporter import _registration

import lazy_compile
from lazy_compile import AlwaysCompute, LazyConfig, LazyModule
from lazy_compile.backends.onnx.export import OnnxReport, export_onnx
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.ladder import capture
from lazy_compile.ir.program import Program
from lazy_compile.planning import planner, search
from lazy_compile.planning.search import SearchOptions
from support.small_model import fresh
from support.toy_models import REFUSED, TOYS, call

torch.set_num_threads(1)
gc.freeze()  # the collector need not walk through torch, whose objects stay


@pytest.fixture(autouse=True)
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search has one round unless a test asks for more; its last comparison takes two batches, not 192 samples."""
    monkeypatch.setattr(planner, "SearchOptions", lambda: SearchOptions(rounds=1))
    monkeypatch.setattr(search, "FINAL_SAMPLES", 8)


@pytest.fixture(autouse=True, scope="session")
def one_reading_of_operators() -> Iterator[None]:
    """torch parses the source of every operator that it can export, at each export again: a sixth of its time here."""
    apis = _registration.onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", cache(apis.get_torchlib_ops))
        yield


@cache
def _compiled(toy: str) -> LazyModule:
    return lazy_compile.transform(TOYS[toy].model(), call(TOYS[toy]))


@cache
def _captured(toy: str) -> Program:
    if toy in TOYS:
        return _compiled(toy).graph.captured.program
    layout, tensors = CallLayout.of((), call(REFUSED[toy]))
    return capture(REFUSED[toy].model(), layout, tensors).program


@pytest.fixture
def compiled() -> Callable[..., LazyModule]:
    """``compiled("dit", reuse="last")``: a toy as a lazy model without caches or statistics. Leave its weights."""

    def get(toy: str, **options: object) -> LazyModule:
        lazy = _compiled(toy)
        lazy.lazy_config = LazyConfig(**options)
        lazy.policy = AlwaysCompute()
        lazy.reset_stats()
        return lazy

    return get


@pytest.fixture
def captured() -> Callable[[str], Program]:
    """``captured("dit")``: the graph of a toy before any pass."""
    return _captured


@pytest.fixture(scope="session")
def shared() -> LazyModule:
    """A small lazy model without changed weights; a test sets the policy it needs."""
    return fresh()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[LazyModule, Path, OnnxReport]]:
    """``exported("dit", "linear")``: a lazy toy, its ONNX file, and the report of the export."""
    made: dict[tuple[str, str], tuple[LazyModule, Path, OnnxReport]] = {}

    def get(toy: str, reuse: str) -> tuple[LazyModule, Path, OnnxReport]:
        if (toy, reuse) not in made:
            lazy = lazy_compile.transform(TOYS[toy].model(), call(TOYS[toy]), reuse=reuse, batch_rule="all_reuse")
            path = tmp_path_factory.mktemp("onnx") / f"{toy}.onnx"
            made[toy, reuse] = lazy, path, export_onnx(lazy, path, dynamic=False)
        lazy, path, report = made[toy, reuse]
        lazy.policy = AlwaysCompute()
        lazy.reset_stats()
        return lazy, path, report

    return get
