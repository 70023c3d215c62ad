"""Captures that are kept on disk: what another process reads does what a capture of its own would do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import pass_pipelines
from lazy_compile.capture.capture_folder import CACHE_DIR
from lazy_compile.capture.captured import Capture
from lazy_compile.config import LazyConfig
from lazy_compile.ir.program import Program
from lazy_compile.storage import load_tensors
from support.kept_models import FAMILIES, Toy, call, case, kept_capture, run, toy


def text(program: Program) -> list[str]:
    return [f"{node.format_node()} {node.meta.get('val')}" for node in program.graph.nodes]


# What is read is what was captured


def test_a_kept_capture_is_the_capture(kept: tuple[Path, Capture], exports: list[object]) -> None:
    folder, fresh = kept
    model = toy()
    read = kept_capture(model, call(), folder)
    assert not exports
    assert str(read.program.graph) == str(fresh.program.graph)
    assert [(read.rung, read.attempts, read.guards, read.is_exact, read.output_spec)] == [
        (fresh.rung, fresh.attempts, fresh.guards, True, fresh.output_spec)
    ]
    gated = [pass_pipelines.gating(LazyConfig()).run(found.program) for found in (fresh, read)]
    assert text(gated[0]) == text(gated[1])
    assert gated[0].branches == gated[1].branches


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_it_serves_other_sizes(kept: tuple[Path, Capture], exports: list[object], batch: int) -> None:
    model, other = toy(), call(batch, tokens=batch + 4)
    read = kept_capture(model, other, kept[0])
    assert not exports
    assert torch.equal(run(read, model, other)[0], model(**other))
    assert read.accepts(list(call(5, 9).values()))


def test_weights_and_tables_are_those_of_the_model(kept: tuple[Path, Capture]) -> None:
    (file,) = kept[0].glob("*/*.safetensors")
    tensors, _ = load_tensors(file)
    assert [tensor.numel() for tensor in tensors.values()] == [2]  # what its code makes, and nothing that it holds
    model = toy()
    read = kept_capture(model, call(), kept[0])
    for change in (model.embed.weight, model.tables[0], model.table):
        with torch.no_grad():
            change.mul_(-2)
        assert torch.equal(run(read, model, call())[0], model(**call()))


def test_a_lazy_model_starts_without_a_capture(
    kept: tuple[Path, Capture], exports: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy()
    lazy = lazy_compile.transform(model, call(), capture_cache=kept[0])
    assert torch.equal(lazy(**call()), model(**call()))
    monkeypatch.setenv(CACHE_DIR, str(kept[0]))
    lazy = lazy_compile.transform(model)
    assert torch.equal(lazy(**call(3)), model(**call(3)))
    assert not exports
    assert lazy.capture_cache == kept[0]
    model.factor = 2.0  # changes of the model are seen as after a capture
    assert torch.equal(lazy(**call()), model(**call()))
    assert exports


def test_torch_remembers_no_operators_of_a_capture(tmp_path: Path) -> None:
    found = kept_capture(toy(), call(), tmp_path)
    size: Any = found.fake_tensors[0].shape[0]
    assert not size.node.shape_env.fake_tensor_cache


# What is not kept


class Noisy(Toy):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x), t)


class Reads(Toy):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t if t.max() > 1 else 1000 * t)


@pytest.mark.parametrize(("kind", "reason"), [(Noisy, "random numbers"), (Reads, "reads values")])
def test_what_has_no_written_form_is_not_kept(
    kind: type[Toy], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lazy_compile")
    kept_capture(kind().eval(), call(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert any("is not kept" in record.getMessage() and reason in record.getMessage() for record in caplog.records)


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    kept_capture(toy(), call(), tmp_path / "file")
    assert "is not kept" in caplog.text


# Another process

CHILD = """
import sys
import torch
from torch.utils import _pytree as pytree
import lazy_compile
from support.kept_models import case

def refuse(*args, **kwargs):
    raise SystemExit("a capture was made")

torch.export.export = refuse
for name in sys.argv[2:]:
    model, arguments, more = case(name)
    lazy = lazy_compile.transform(model, arguments, capture_cache=sys.argv[1])
    for each in (arguments, more):
        with torch.no_grad():
            seen, expected = (pytree.tree_leaves(call(**each)) for call in (lazy, model))
        assert all(map(torch.equal, seen, expected)), name
    print(name, len(lazy.branches))
"""


@pytest.mark.parametrize("names", [["toy"], pytest.param(list(FAMILIES), marks=pytest.mark.slow)])
def test_another_process_starts_without_a_capture(names: list[str], tmp_path: Path) -> None:
    branches = {}
    for name in names:
        model, arguments, _ = case(name)
        branches[name] = len(lazy_compile.transform(model, arguments, capture_cache=tmp_path).branches)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), *names],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path),
             "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [word for name in names for word in (name, str(branches[name]))]
