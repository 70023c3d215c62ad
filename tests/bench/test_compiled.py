"""``bench compile`` in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lazy_compile import LazyModule
from lazy_compile.bench import compiled
from lazy_compile.errors import VerificationError


@pytest.mark.slow
def test_rows_are_written_as_they_are_measured_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"models": ["DiT"], "granularities": ["branch"], "layers": 1, "repeats": 2, "backend": "eager"}
    torch._dynamo.reset()
    (row,) = compiled.run(tmp_path, reuse=(0.0,), **settings)  # type: ignore[arg-type]
    assert row.error == 0.0
    assert (row.branches, row.ideal_ratio, row.dense_graphs) == (2, 1.0, 1)
    assert row.lazy_graphs == 4  # one ends behind each branch, one at the output; the first also without invariants
    assert row.compiled_calls == 3.0
    monkeypatch.setattr(compiled._Bench, "measure", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compiled.run(tmp_path, reuse=(0.0, 0.5), **settings)  # type: ignore[arg-type]
    (written,) = json.loads((tmp_path / "compile.json").read_text())["rows"]
    assert written["compiled_ratio"] == row.compiled_ratio
    monkeypatch.setattr(compiled, "_Bench", lambda *args: 1 / 0)
    assert len(compiled.run(tmp_path, reuse=(0.0,), **settings)) == 1  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):  # other settings begin anew
        compiled.run(tmp_path, reuse=(0.0,), **{**settings, "repeats": 3})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_in_which_nothing_is_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyModule, "compile", lambda *args, **options: None)
    torch._dynamo.reset()
    with pytest.raises(VerificationError, match="and 0 of the lazy one"):
        compiled.run(models=["DiT"], reuse=(0.5,), layers=1, repeats=2, backend="eager")
