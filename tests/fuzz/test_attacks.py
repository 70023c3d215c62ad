"""Files that were made on purpose: nothing in them runs, and nothing outside of their folder is read or written."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lazy_compile
from fuzz.artefacts import KINDS, ROW, SMALL, Small, Workshop
from fuzz.test_mutations import time_limit
from lazy_compile import GateTable, Learned, execution
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.metadata import KEY, OnnxMetadata
from lazy_compile.backends.onnx.sealed_file import read_proto
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.triton import export_triton
from lazy_compile.capture.exported_file import load_exported
from lazy_compile.digests import DIGEST, verification, with_digest
from lazy_compile.errors import ArtifactError, ConfigError, LazyCompileError
from lazy_compile.integrations.engine_module import EngineModule
from lazy_compile.reporting.html_report import write_report
from lazy_compile.tree_specs import load_tree_spec
from lazy_compile.verification import compare
from support.toy_models import Toy, call


@pytest.fixture(scope="module")
def made(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    shop.seed = 0
    for kind in KINDS:
        folders[kind.name] = tmp_path_factory.mktemp(kind.name)
        kind.write(shop, folders[kind.name])
    return folders


# Code -----------------------------------------------------------------------------------------------------------------


class Evil:
    """Its pickle makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def with_member(source: Path, target: Path, ending: str, change: Any) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(ending) else content)


def test_a_pickled_member_is_not_run(made: dict[str, Path], tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pt2"
    content = io.BytesIO()
    torch.save(Evil(str(trap)), content)
    with_member(made["pt2"] / "m.pt2", path, "sample_inputs/model.pt", lambda _: content.getvalue())
    with pytest.raises(ArtifactError, match="is pickled and holds more than tensors"):
        load_exported(path)
    assert not trap.exists()


def test_a_weight_that_says_it_is_pickled_is_not_run(made: dict[str, Path], tmp_path: Path) -> None:
    trap, middle, path = tmp_path / "trap", tmp_path / "middle.pt2", tmp_path / "evil.pt2"

    def says_so(text: bytes) -> bytes:
        values = json.loads(text)
        for entry in values["config"].values():
            entry["use_pickle"] = True
        return json.dumps(values).encode()

    with_member(made["pt2"] / "m.pt2", middle, "weights_config.json", says_so)
    with_member(middle, path, "weight_0", lambda _: pickle.dumps(Evil(str(trap))))
    with pytest.raises(ArtifactError, match="is pickled and holds more than tensors"):
        load_exported(path)
    assert not trap.exists()


@pytest.mark.parametrize("place", ["expr_str", "guards_code"])
def test_a_size_that_is_code_is_not_evaluated(made: dict[str, Path], tmp_path: Path, place: str) -> None:
    """torch has sympy evaluate sizes, and Python the guards."""
    trap, path = tmp_path / "trap", tmp_path / "evil.pt2"
    code = f"__import__('os').mkdir('{trap}')"

    def evil(text: bytes) -> bytes:
        values = json.loads(text)
        if place == "guards_code":
            values[place] = [code]
        else:
            values["range_constraints"] = {}
            values["graph_module"]["graph"]["sym_int_values"] = {"s0": {"as_expr": {"expr_str": code, "hint": None}}}
        return json.dumps(values).encode()

    with_member(made["pt2"] / "m.pt2", path, "models/model.json", evil)
    with pytest.raises(ArtifactError, match=r"is no (symbolic size|condition on sizes)"):
        load_exported(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("collections.defaultdict", {"default_factory_module": "evil", "default_factory_name": "run"}),
        ("builtins.dict", [{"__enum__": True, "fqn": "evil.Run", "name": "a"}]),
    ],
)  # fmt: skip
def test_a_form_that_names_a_module_imports_none(
    kind: str, context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("run = Run = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])
    with pytest.raises(ArtifactError, match="names something to import"):
        load_tree_spec(text, "a file")
    assert "evil" not in sys.modules


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["../outside", "/etc/hostname", "a/../../outside", "link", "pipe", "zero", "a\\b"])
def test_weights_come_from_plain_files_of_the_folder(made: dict[str, Path], tmp_path: Path, where: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(4096))
    (folder / "a").mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    proto = onnx.load(str(made["external"] / "m.onnx"), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = where
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with time_limit(5), pytest.raises(ArtifactError), verification(False):
        read_proto(folder / "m.onnx")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", 'a"\nparameters', "a\\b", "x" * 200])
def test_the_name_of_a_model_stays_in_its_repository(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="it becomes a folder of the repository"):
        export_triton(made["onnx"] / "m.onnx", tmp_path / "models", name)
    assert not (tmp_path / "models").exists()


def test_the_name_of_a_tensor_stays_in_its_quotes(made: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(str(made["onnx"] / "m.onnx"))
    new = 'x" } parameters { key: "EXECUTION_ENV_PATH" value: { string_value: "/evil'
    for value in (*model.graph.input, *(node for node in model.graph.node)):
        if isinstance(value, onnx.ValueInfoProto) and value.name == "x":
            value.name = new
        elif isinstance(value, onnx.NodeProto):
            value.input[:] = [new if name == "x" else name for name in value.input]
    onnx.save(model, str(tmp_path / "m.onnx"))
    with verification(False), pytest.raises(LazyCompileError):
        export_triton(tmp_path / "m.onnx", tmp_path / "models", "m")
    assert not list(tmp_path.rglob("config.pbtxt"))


def test_a_stem_is_no_pattern(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazy_compile.backends.onnx.save.EXTERNAL_BYTES", 0)
    other = tmp_path / "a.01234567.data"
    other.write_text("not yours")
    for _ in range(2):
        export_onnx(shop.lazy, tmp_path / "[ab].onnx")
    assert other.read_text() == "not yours"
    assert len(list(tmp_path.iterdir())) == 3


# Text -----------------------------------------------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>"


def report(folder: Path, **changes: Any) -> str:
    onnx_values = {"branches": 2, "if_nodes": 2, "heavy_ops_outside_if": 0, "max_abs_error": 1e-6}
    values = {"model": "m", "steps": 3, "rows": [ROW], "decisions_varying_between_samples": 0.0, "onnx": onnx_values}
    (folder / "summary.json").write_text(json.dumps(with_digest({**values, **changes})))
    return write_report(folder, folder / "report.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": SCRIPT},
        {"steps": SCRIPT},
        {"rows": [{**ROW, "method": SCRIPT}]},
        {"rows": [{**ROW, "lazy_ratio": SCRIPT}]},
        {"onnx": {"branches": SCRIPT, "if_nodes": SCRIPT, "heavy_ops_outside_if": SCRIPT, "max_abs_error": 1e-6}},
        {"decisions_varying_between_samples": SCRIPT},
    ],
)
def test_nothing_in_a_summary_becomes_markup(tmp_path: Path, changes: dict[str, Any]) -> None:
    try:
        page = report(tmp_path, **changes)
    except ArtifactError:
        return
    assert "<script>" not in page


def test_long_labels_take_neither_memory_nor_time(tmp_path: Path) -> None:
    with time_limit(20):
        try:
            page = report(tmp_path, model="m" * 3_000_000, rows=[{**ROW, "method": "x$" * 1_500_000}])
        except ArtifactError:
            return
    assert len(page) < 20_000_000


def test_dollars_in_the_names_of_branches_are_dollars(shop: Workshop, tmp_path: Path) -> None:
    shop.lazy.policy = Learned(shop.table)
    shop.lazy.save(tmp_path)
    values = json.loads((tmp_path / "lazy.json").read_text())
    del values[DIGEST]
    for number, branch in enumerate(values["branches"]):
        branch["name"] = "$" * (number + 1) + r"\frac{_^$ <b>"
    (tmp_path / "lazy.json").write_text(json.dumps(with_digest(values)))
    assert "What the gates lean to" in write_report(tmp_path, tmp_path / "report.html").read_text()


# Other models ---------------------------------------------------------------------------------------------------------


class Other(Small):
    """It takes and returns the same, and has a weight more."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(3))


def test_the_file_of_another_model_is_refused_wherever_there_is_an_original(made: dict[str, Path]) -> None:
    toy = Toy(Other, SMALL.shapes, ())
    other, path = lazy_compile.transform(toy.model(), call(toy)), made["onnx"] / "m.onnx"
    runner = OnnxRunner(path, threads=1)

    def sample(denoiser: Any, seed: int) -> Any:
        return denoiser(**call(toy))

    with pytest.raises(ArtifactError, match="exported from another"):
        execution.run(other, sample, runner=runner, follow_runner=True)
    with pytest.raises(ArtifactError, match="exported from another"):
        EngineModule(path, like=other.original)
    with pytest.raises(ArtifactError, match="exported from another"):
        compare(other, sample, onnx=path)
    with pytest.raises(ArtifactError, match="made for another model"):
        lazy_compile.load(made["gates"], other.original)


# Numbers --------------------------------------------------------------------------------------------------------------

READERS: dict[str, Any] = {
    "gates": lambda shop, folder: lazy_compile.load(folder, shop.lazy.original),
    "schedule": lambda shop, folder: ScheduleVariants.load(folder / "set"),
    **{kind.name: kind.use for kind in KINDS if kind.name in ("engine", "timings", "import", "summary")},
}


def numbers(values: Any) -> Any:
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from numbers(value)
        elif isinstance(value, int | float):
            yield values, key


@pytest.mark.parametrize("kind", READERS)
def test_no_file_holds_a_number_that_is_none(made: dict[str, Path], shop: Workshop, kind: str) -> None:
    """The digest left out: it is the form that is wrong."""
    for path in (path for path in made[kind].rglob("*") if path.suffix == ".json"):
        before = path.read_text()
        values = json.loads(before)
        places = list(numbers(values))
        for place, key in places[:: max(1, len(places) // 12)]:
            kept, place[key] = place[key], float("nan")
            path.write_text(json.dumps(values))
            with verification(False), pytest.raises(LazyCompileError):
                READERS[kind](shop, made[kind])
            place[key] = kept
        path.write_text(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias", "knots"])
def test_gates_are_finite(shop: Workshop, tmp_path: Path, name: str, value: float) -> None:
    table = shop.table
    tensors = {key: tensor.clone() for key, tensor in table.tensors.items()}
    tensors[name].view(-1)[0] = value

    def there_and_back() -> None:
        shop.lazy.policy = Learned(GateTable(table.features, **tensors))
        shop.lazy.save(tmp_path)
        lazy_compile.load(tmp_path, shop.lazy.original)

    with pytest.raises(LazyCompileError):
        there_and_back()


def test_initial_values_are_finite(made: dict[str, Path]) -> None:
    (entry,) = [item for item in read_proto(made["onnx"] / "m.onnx").metadata_props if item.key == KEY]
    values = json.loads(entry.value)
    values["slots"][0]["initial"] = float("nan")
    with pytest.raises(ArtifactError):
        OnnxMetadata.parse({KEY: json.dumps(values)})


def test_images_that_do_not_end_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    report(tmp_path)
    with zipfile.ZipFile(tmp_path / "samples.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        content = io.BytesIO()
        np.save(content, np.zeros((1, 1, 4, 4)))
        archive.writestr("reference.npy", content.getvalue() + bytes(2**27))
    with pytest.raises(ArtifactError, match="it unpacks to"):
        report(tmp_path)
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("reference.npy", content.getvalue().replace(b"(1, 1, 4, 4)", b"(9, 9, 99,9)"))
    with pytest.raises(ArtifactError, match="holds 128 bytes"):
        report(tmp_path)
