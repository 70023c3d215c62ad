"""One tiny artefact of every kind, of two models that differ in nothing but numbers, and what reads and uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, LazyModule, Learned, Scheduled
from lazy_compile.backends.onnx import convert as converting
from lazy_compile.backends.onnx import lifted_model, prologue
from lazy_compile.backends.onnx import save as onnx_save
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.prologue import check_prologue, find_prologue
from lazy_compile.backends.onnx.sealed_file import read_proto
from lazy_compile.backends.onnx.weight_places import note_places
from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt import build
from lazy_compile.backends.tensorrt.build import build_engine, build_engines
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.layers import EngineLayer
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.backends.triton import export_triton, model_file
from lazy_compile.capture.exported_file import load_exported
from lazy_compile.digests import digest_of
from lazy_compile.planning.import_schedule import import_schedule
from lazy_compile.planning.journal import Journal
from lazy_compile.planning.timings import BranchTimings
from lazy_compile.policies.serialize import to_json
from lazy_compile.reporting.html_report import write_report
from lazy_compile.runtime.artifact import read
from lazy_compile.storage import atomic_path, load_tensors, save_json, save_sealed_json, save_tensors
from support.toy_models import Toy, call


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        h = x + timestep[:, None, None]
        h = h + self.down(torch.tanh(self.up(h)))
        result: Tensor = h + self.down(torch.relu(self.up(h + self.embed(text))))
        return result


SMALL = Toy(Small, {"x": (6, 4), "timestep": (), "text": (6, 4)}, ())
TABLE = CacheSchedule(np.array([[1, 1], [0, 1], [1, 1]]) > 0)


@dataclass
class Workshop:
    """A lazy model; ``seed`` says which of the two models is written."""

    lazy: LazyModule
    converted: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def of_small(cls) -> Workshop:
        return cls(lazy_compile.transform(SMALL.model(), call(SMALL)))

    @property
    def table(self) -> GateTable:
        return GateTable.constant(self.lazy.branches, torch.tensor([1000.0, 0.0]), bias=float(self.seed + 1))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Each graph is converted to ONNX once: of the second model it has other weights. An engine is the digest of
        its source, since building one takes longer than all else here. Only while it is open: no test outside may
        meet them."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lifted_model, "convert", self._convert)
            patch.setattr(prologue, "convert", self._convert)
            patch.setattr(build, "_make", _make)
            yield

    def _convert(self, original: nn.Module, program: Any, *rest: Any) -> onnx_ir.Model:
        key = str(program.graph)
        if key not in self.converted:
            self.converted[key] = converting.convert(original, program, *rest)
        model: onnx_ir.Model = self.converted[key].clone()
        note_places(model, original, program)
        for value in model.graph.initializers.values():
            if value.const_value.dtype == onnx_ir.DataType.FLOAT:
                value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.5**self.seed, name=value.name)
        return model


def _make(source: Any, target: Path, config: Any, ranges: Any, policy: Any, on_progress: Any) -> build._Made:
    plan = source.content.encode()
    layer = EngineLayer("a", "gemm")
    sidecar = EngineSidecar(
        "rtx", "1", "", "key", digest_of(plan), {"tf32": True}, source.tensors, source.model, source.prologue,
        to_json(policy), {"": ("MatMul",)}, (layer,),
    )  # fmt: skip
    return build._Made(target, "", plan, sidecar, sidecar.structure(), 0.0, "", "")


@dataclass(frozen=True)
class Kind:
    """``sealed``: whether a file that is used carries a digest, so that nothing may change silently.

    ``files``: how many it has, at least. ``complete``: whether it is no more without one of them.
    """

    name: str
    write: Callable[[Workshop, Path], Any]
    use: Callable[[Workshop, Path], Any]
    sealed: bool = True
    files: int = 1
    complete: bool = True


def _export(**options: Any) -> Callable[[Workshop, Path], Any]:
    def write(shop: Workshop, folder: Path) -> None:
        limit, given = onnx_save.EXTERNAL_BYTES, dict(options)
        shop.lazy.policy = Scheduled(TABLE) if given.get("gating") == "schedule" else Learned(shop.table)
        try:
            if given.pop("external", False):
                onnx_save.EXTERNAL_BYTES = 0
            export_onnx(shop.lazy, folder / ("set" if given.get("gating") == "schedule" else "m.onnx"), **given)
        finally:
            onnx_save.EXTERNAL_BYTES = limit

    return write


def _run(shop: Workshop, folder: Path) -> Any:
    (path,) = [path for path in (folder / "set", folder / "m.ort", folder / "m.onnx") if path.exists()][:1] or [folder]
    runner = OnnxRunner(path, threads=1)
    inputs = call(SMALL)
    outputs = [runner.run(inputs, force=force) for force in ("compute", [True, False])]
    return [tensor.numpy().tobytes() for step in outputs for tensor in step], runner.metadata, runner.prologue is None


def _build(shop: Workshop, folder: Path) -> None:
    # The source is another folder's business: only the engine may be cut short here.
    source = folder.parent / f"{folder.name}-source-{shop.seed}"
    if not source.exists():
        _export(invariants=("text",))(shop, source)
    build_engine(source / "m.onnx", folder / "m.engine")


def _build_set(shop: Workshop, folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source-{shop.seed}"
    if not source.exists():
        _export(gating="schedule", invariants=("text",))(shop, source)
    build_engines(source / "set", folder / "set", BuildConfig(flavor="rtx"))


def _read_engine(shop: Workshop, folder: Path) -> Any:
    path = folder / "set" if (folder / "set").exists() else folder / "m.engine"
    seen = []
    for file in ScheduleVariants.load(path).files.values() if path.is_dir() else [path]:
        sidecar = EngineSidecar.load(file)
        assert sidecar.model is not None
        seen.append((sidecar.check_file(file), sidecar))
        beside = find_prologue(file, sidecar.model)
        assert beside is not None
        described = EngineSidecar.load(beside)
        check_prologue(beside, described.prologue, file, sidecar.model)
        seen.append((described.check_file(beside), described))
    return seen


def _read_gates(shop: Workshop, folder: Path) -> Any:
    artifact = read(folder)
    return to_json(artifact.policy), replace(artifact, policy=None, directory=None)  # type: ignore[arg-type]


def _save_gates(shop: Workshop, folder: Path) -> None:
    shop.lazy.policy = Learned(shop.table)
    shop.lazy.save(folder)


def _read_tensors(shop: Workshop, folder: Path) -> Any:
    tensors, metadata = load_tensors(folder / "c.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}, metadata


def _save_exported(shop: Workshop, folder: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), folder / "m.pt2")


def _journal(shop: Workshop, folder: Path) -> None:
    """The second search goes on where the first one was."""
    journal = Journal(folder / "search", {"model": "a"})
    for number in range(shop.seed + 1):
        journal.array(f"effects-{number}", lambda: np.arange(4.0))


def _read_journal(shop: Workshop, folder: Path) -> Any:
    journal = Journal(folder / "search", {"model": "a"})
    names = sorted(name for name in journal.known if name.startswith("effects-"))
    return {name: np.asarray((journal.recall(name, "values") or {})["values"]).tolist() for name in names}


def _triton(shop: Workshop, folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source-{shop.seed}"
    if not source.exists():
        _export()(shop, source)
    export_triton(source / "m.onnx", folder, "m", policy=Learned(shop.table))


def _read_triton(shop: Workshop, folder: Path) -> Any:
    config, model = model_file(folder / "m")
    read_proto(model)
    weights = [value.const_value for value in onnx_ir.load(model).graph.initializers.values()]
    contents = [None if value is None else value.tobytes() for value in weights]
    return config.replace(model.name, ""), contents


def _ort(shop: Workshop, folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source-{shop.seed}"
    if not source.exists():
        _export(invariants=("text",))(shop, source)
    convert_to_ort(source / "m.onnx", folder / "m.ort")


ROW = {
    "method": "dense", "sampler_steps": 3, "lazy_ratio": 0.0, "compute_ratio": 1.0, "rmse_dense": 0.0,
    "rmse_reference": 0.1, "frechet": 0.2, "seeds": 1,
}  # fmt: skip


def _summary(shop: Workshop, folder: Path) -> None:
    onnx = {"branches": 2, "if_nodes": 2, "heavy_ops_outside_if": 0, "max_abs_error": 1e-6}
    values = {"model": f"m{shop.seed}", "steps": 3, "rows": [ROW], "decisions_varying_between_samples": 0.0}
    save_sealed_json(folder / "summary.json", {**values, "onnx": onnx})
    images = np.full((2, 1, 4, 4), 0.5 + shop.seed)
    with atomic_path(folder / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, branches=np.array(["a"]), reference=images, images_0=images)


def _read_summary(shop: Workshop, folder: Path) -> Any:
    return write_report(folder, folder.parent / "report.html").read_bytes()


def _report(shop: Workshop, folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source-{shop.seed}"
    if not source.exists():
        source.mkdir()
        _save_gates(shop, source)
    write_report(source, folder / "report.html")


KINDS = (
    Kind("gates", _save_gates, _read_gates, files=2),
    Kind("onnx", _export(), _run),
    Kind("external", _export(external=True), _run, files=2),
    Kind("prologue", _export(invariants=("text",)), _run, files=2),
    Kind("schedule", _export(gating="schedule", invariants=("text",)), _run, files=2),
    Kind("engine", _build, _read_engine, files=2),
    Kind(
        "checkpoint",
        lambda shop, folder: save_tensors(folder / "c.safetensors", shop.table.tensors, {"kind": "test"}),
        _read_tensors,
    ),
    Kind("journal", _journal, _read_journal, complete=False),
    Kind(
        "timings",
        lambda shop, folder: save_json(folder / "t.json", {"branches": [0.1, 0.2 + shop.seed], "total": 5.0}),
        lambda shop, folder: BranchTimings.load(folder / "t.json").as_array.tolist(),
        sealed=False,
    ),
    Kind(
        "import",
        lambda shop, folder: save_json(folder / "s.json", {"mlp": [1, 0, 1 - shop.seed]}),
        lambda shop, folder: import_schedule(folder / "s.json", shop.lazy.branches, 3),
        sealed=False,
    ),
    Kind("pt2", _save_exported, lambda shop, folder: load_exported(folder / "m.pt2"), sealed=False),
    Kind("summary", _summary, _read_summary, sealed=False, files=2),
)
"""What is damaged."""

WRITERS = (
    *(kind for kind in KINDS if kind.name not in ("import", "pt2", "summary")),
    Kind("engines", _build_set, _read_engine),
    Kind("ort", _ort, _run),
    Kind("triton", _triton, _read_triton),
    Kind("report", _report, lambda shop, folder: (folder / "report.html").read_bytes()),
)
"""What is cut short."""
