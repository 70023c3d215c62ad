"""One tiny artefact of every kind, made twice of different models, and a function that reads and uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, LazyModule, Learned, Scheduled
from lazy_compile.backends.onnx import save as onnx_save
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt.layers import EngineLayer
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.capture.exported_file import load_exported
from lazy_compile.digests import digest_of
from lazy_compile.planning.import_schedule import import_schedule
from lazy_compile.planning.timings import BranchTimings
from lazy_compile.policies.serialize import to_json
from lazy_compile.runtime.artifact import read
from lazy_compile.storage import load_tensors, save_json, save_tensors
from support.hoisting import CONDITIONED
from support.toy_models import call, randomize

TABLE = CacheSchedule(np.array([[1, 1, 1], [0, 1, 0], [1, 0, 1]]) > 0)
ENGINE = b"an engine"


@dataclass(frozen=True)
class Kind:
    """``sealed``: whether a file that is used carries a digest, so that nothing may change silently.

    ``files``: how many it has, at least.
    """

    name: str
    write: Callable[[LazyModule, Path], Any]
    use: Callable[[LazyModule, Path], Any]
    sealed: bool = True
    files: int = 1


def make_lazy(seed: int) -> LazyModule:
    model = randomize(CONDITIONED.model(), seed)
    lazy = lazy_compile.transform(model, call(CONDITIONED))
    table = GateTable.constant(lazy.branches, torch.tensor([1000.0, 0.0]), bias=float(seed + 1))
    lazy.policy = Learned(table)
    return lazy


def _export(**options: Any) -> Callable[[LazyModule, Path], Any]:
    def write(lazy: LazyModule, folder: Path) -> None:
        policy, limit = lazy.policy, onnx_save.EXTERNAL_BYTES
        given = dict(options)
        path = folder / "m.onnx"
        try:
            if given.pop("external", False):
                onnx_save.EXTERNAL_BYTES = 0
            if given.get("gating") == "schedule":
                lazy.policy, path = Scheduled(TABLE), folder / "set"
            export_onnx(lazy, path, **given)
        finally:
            lazy.policy, onnx_save.EXTERNAL_BYTES = policy, limit

    return write


def _run(lazy: LazyModule, folder: Path) -> Any:
    path = folder / "set" if (folder / "set").exists() else folder / "m.onnx"
    runner = OnnxRunner(path, threads=1)
    inputs = call(CONDITIONED)
    outputs = [runner.run(inputs, force=force) for force in ("compute", [True, False, True])]
    return [tensor.numpy().tobytes() for step in outputs for tensor in step], runner.metadata


def _write_engine(lazy: LazyModule, folder: Path) -> None:
    content = ENGINE + bytes(str(lazy.policy.table.bias.tolist()), "ascii")  # type: ignore[attr-defined]
    (folder / "m.engine").write_bytes(content)
    EngineSidecar(
        "rtx", "1", "", "key", digest_of(content), {"tf32": True}, (EngineTensor("x", True, "float32", (1, 2)),), None,
        "", to_json(lazy.policy), {"": ("MatMul",)}, (EngineLayer("a", "gemm"),),
    ).save(folder / "m.engine")  # fmt: skip


def _read_engine(lazy: LazyModule, folder: Path) -> Any:
    sidecar = EngineSidecar.load(folder / "m.engine")
    plan = sidecar.check_file(folder / "m.engine")
    return plan, sidecar


def _read_gates(lazy: LazyModule, folder: Path) -> Any:
    artifact = read(folder)
    return to_json(artifact.policy), replace(artifact, policy=None, directory=None)  # type: ignore[arg-type]


def _read_tensors(lazy: LazyModule, folder: Path) -> Any:
    tensors, metadata = load_tensors(folder / "c.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}, metadata


def _save_exported(lazy: LazyModule, folder: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), folder / "m.pt2")


def _times(lazy: LazyModule, folder: Path) -> None:
    save_json(folder / "t.json", {"branches": [0.1, 0.2, float(lazy.policy.table.bias[0, 0]) / 10], "total": 5.0})  # type: ignore[attr-defined]


KINDS = (
    Kind("gates", lambda lazy, folder: lazy.save(folder), _read_gates, files=2),
    Kind("onnx", _export(), _run),
    Kind("external", _export(external=True), _run, files=2),
    Kind("prologue", _export(invariants=("text",)), _run, files=2),
    Kind("schedule", _export(gating="schedule"), _run, files=2),
    Kind("engine", _write_engine, _read_engine, files=2),
    Kind(
        "checkpoint",
        lambda lazy, folder: save_tensors(folder / "c.safetensors", lazy.policy.table.tensors, {"kind": "test"}),
        _read_tensors,
    ),
    Kind("timings", _times, lambda lazy, folder: BranchTimings.load(folder / "t.json"), sealed=False),
    Kind(
        "import",
        lambda lazy, folder: save_json(folder / "s.json", {"attn": [1, 0, 1], "mlp": [1, 1, 0]}),
        lambda lazy, folder: import_schedule(folder / "s.json", lazy.branches, 3),
        sealed=False,
    ),
    Kind("pt2", _save_exported, lambda lazy, folder: load_exported(folder / "m.pt2"), sealed=False),
)
