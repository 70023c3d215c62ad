"""Every parser of what people or files give reads it, or says in one line what is wrong."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fuzz.artefacts import SMALL, TABLE, Workshop
from fuzz.test_mutations import LONGEST, time_limit
from fuzz.texts import given_of
from lazy_compile import CacheSchedule, GateTable, Learned, Scheduled
from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.metadata import KEY, SIZES_KEY, FreeSize, InputSpec, OnnxMetadata, SlotSpec
from lazy_compile.backends.onnx.replace_weights import _entry_of
from lazy_compile.backends.onnx.sizes import holds, parse_ranges, union_of, value_at
from lazy_compile.backends.onnx.weight_places import WEIGHTS_KEY
from lazy_compile.backends.tensorrt.layers import EngineLayer, parse_profiles
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.backends.tensorrt.source import _example
from lazy_compile.backends.triton import model_file
from lazy_compile.bench.rows import RowFile
from lazy_compile.capture.capture_folder import KeptCaptures
from lazy_compile.capture.comparison import Verdict
from lazy_compile.capture.written_captures import write_capture
from lazy_compile.capture.written_guards import check_guard
from lazy_compile.cli.models import _parse_shape, find_function, parse_group, parse_options
from lazy_compile.cli.pipelines import call_arguments, read_prompts
from lazy_compile.digests import verification, with_digest
from lazy_compile.errors import LazyCompileError
from lazy_compile.integrations.comfyui import policy_of
from lazy_compile.integrations.diffusers import make_scheduler
from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch
from lazy_compile.planning.estimate import parse_bytes
from lazy_compile.planning.import_schedule import import_schedule
from lazy_compile.planning.journal import IDENTITY, Journal
from lazy_compile.planning.timings import BranchTimings
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.presets import EveryNth
from lazy_compile.policies.serialize import from_json, to_json
from lazy_compile.runtime import artifact
from lazy_compile.storage import load_tensors, parse_json, save_tensors
from lazy_compile.tree_specs import load_tree_spec
from support.toy_models import call

FEW, MANY = 25, 5000
"""Examples of each parser, in ``make test`` and in ``make fuzz``."""


@dataclass(frozen=True)
class Place:
    """Where files lie, and a lazy model."""

    folder: Path
    shop: Workshop

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        return path

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return self.shop.lazy.branches


def _branch(index: int) -> ResidualBranch:
    tensor = BranchTensor("entry", (2, 6, 4), "float32", 0, 2, 0)
    return ResidualBranch(
        index, f"block.{index}", BranchKind.MLP, "block", 12, (tensor,), (tensor,), row_separable=True
    )


BRANCHES = (_branch(0), _branch(1))
GATES = Learned(GateTable.constant(BRANCHES, torch.tensor([1000.0, 0.0]), bias=1.0), shift=0.5)
CONTRACT = OnnxMetadata(
    "Small", BRANCHES, (InputSpec("x", ("batch", "height*2", 4), "float32"), InputSpec("t", ("height",), "float32")),
    ("y", None), (SlotSpec("slot_0", "slot_0_next", ("batch", "(height//2)", 4), "float32", math.inf),), (), "",
    "linear",
    "per_sample", "predicate", (0, 0), True, 2, (), "0" * 64, ("x", "t"), "t",
    pytree.treespec_dumps(pytree.tree_structure({"y": (1, [2])})), 24, 1, None, to_json(GATES),
    (InputSpec("y", ("batch", 6, 4), "float32"),), (FreeSize("batch", 2, 1, 8), FreeSize("height", 6)),
    ("height%2 == 0", "min(batch, height) >= 1"),
)  # fmt: skip
SIDECAR = EngineSidecar(
    "rtx", "1", "", "key", "0" * 64, {"tf32": True}, (EngineTensor("x", True, "float32", (-1, 4), (((1, 4), (2, 4), (8,
    4)),)),),
    CONTRACT, "", to_json(EveryNth(4, 2)), {"": ("MatMul",), "If_0": ("Gemm",)}, (EngineLayer("a", "gemm", ("x",),
    ("y",)),),
)  # fmt: skip
INSPECTED = {
    "Layers": [
        {"Name": "a_myl1_1", "LayerType": "gemm", "Inputs": [{"Name": "x"}], "Outputs": [{"Name": "y [profile 1]"}],
         "Metadata": "[ONNX Layer: /MatMul]"},
        {"Name": "b", "LayerType": "cjmp", "JumpTargetThen": "a_myl1_1", "JumpTargetElse": "c"},
    ]
}  # fmt: skip
LOG = """Name: a, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [2] } ], Constants: [ ], Outputs: [ { Name: y, \
Location: Device } ], TacticName: mha_1, JumpTargetThen: b, Metadata: [ONNX Layer: /MatMul]
Name: b, LayerType: jmp, JumpTarget: a, Metadata: """


@dataclass(frozen=True)
class Row:
    method: str
    seconds: float


def _json_of(name: str, read: Callable[[Path, Place], Any]) -> Callable[[str, Place], Any]:
    """The parser of a file with this text."""
    return lambda text, place: read(place.file(name, text), place)


def _sidecar(text: str, place: Place) -> Any:
    place.file("m.engine.json", text)
    found = EngineSidecar.load(place.folder / "m.engine")
    return found.policy, found.structure()


def _saved(write: Callable[[Path], Any], name: str) -> Callable[[Place], Any]:
    """The JSON of a file that our own writer makes."""

    def written(place: Place) -> Any:
        write(place.folder)
        return json.loads((place.folder / name).read_text())

    return written


def _gates(place: Place) -> Any:
    lazy, lazy.policy = place.shop.lazy, Learned(place.shop.table)
    lazy.save(place.folder)
    return json.loads((place.folder / artifact.MANIFEST).read_text())


def _capture(place: Place) -> Any:
    lazy = place.shop.lazy
    return write_capture(lazy.graph.captured, lazy.original)[0]


def _kept_capture(text: str, place: Place) -> Any:
    """A damaged one is removed, with a warning, and never raises."""
    model, tensors = place.shop.lazy.original, tuple(call(SMALL).values())
    save_tensors(place.folder / "kept" / "0.safetensors", {}, {"capture": text})
    return KeptCaptures(place.folder / "kept", model, tensors).find(lambda found: Verdict())


def _variants(folder: Path) -> None:
    found = ScheduleVariants.of(TABLE, folder)
    for file in found.files.values():
        file.write_bytes(b"model")
    found.save(folder)


def _formula(text: str, place: Place) -> Any:
    """As a condition, and as the size of a cache."""
    values = json.loads(CONTRACT.to_json())
    values["conditions"], values["slots"][0]["shape"] = [text], [text, 4]
    found = OnnxMetadata.parse({KEY: json.dumps(values)})
    sizes = {"batch": 3, "height": 8}
    holds(text, sizes)
    return value_at(text, sizes), found.at_sizes({"height": 8})


def _weights(text: str, place: Place) -> Any:
    model: Any = SimpleNamespace(metadata_props={WEIGHTS_KEY: text}, graph=SimpleNamespace(initializers={"w": None}))
    return _entry_of(model, Path("m.onnx"))


def _tensors(content: bytes, place: Place) -> Any:
    return load_tensors(place.file("c.safetensors", content))


def _saved_tensors(place: Place) -> bytes:
    save_tensors(place.folder / "c.safetensors", {"a": torch.arange(4.0)}, {"kind": "test"})
    return (place.folder / "c.safetensors").read_bytes()


def _usable(policy: Policy) -> Policy:
    policy.check(BRANCHES)
    policy.slopes(1, 500.0, 1000.0)
    return policy


@dataclass(frozen=True)
class Parser:
    """``valid``: what it takes, or what makes it; JSON where it is neither text nor bytes."""

    name: str
    valid: Any
    read: Callable[[Any, Place], Any]


PARSERS = (
    Parser("--shape", "x:2x4:float32", lambda text, _: _parse_shape(text)),
    Parser("--minShapes", "x:1x4x32,'a:b':1", lambda text, _: parse_ranges([text], [], [text])),
    Parser("profiles", "x:1x4,t:1", lambda text, _: union_of(parse_ranges(["x:1x4", text], [text], []))),
    Parser("--group", "2", lambda text, _: parse_group(text)),
    Parser("--set", "max_reuse_age=3", lambda text, _: parse_options([text])),
    Parser("--set granularity", "granularity=block", lambda text, _: parse_options([text, "probe=first_block"])),
    Parser("--call", "sizes=[1, (2.5, None)]", lambda text, _: call_arguments([text])),
    Parser("--max-memory", "4.5 GiB", lambda text, _: parse_bytes(text)),
    Parser("--prompts", b"a lighthouse\n\nanother \xc3\xa9\n", lambda text, place: read_prompts(place.file("p", text))),
    Parser("MODEL", ".no_module:f.g", lambda text, _: find_function(f"{text}:no_function")),
    Parser("--scheduler", "ddim", lambda text, _: make_scheduler(text)),
    Parser("ComfyUI's schedule", "1111 0101", lambda text, _: policy_of(text)),
    Parser("formula", "(height//2)*min(batch, 3)-5%height", _formula),
    Parser("guard", "2 <= L['x'].size()[0] and L['x'].stride(0) + 1 != 5", lambda text, _: check_guard(text, "it")),
    Parser("schedule", {**TABLE.to_json(), "slopes": [[1.0, 0.5]] * 3},
           _json_of("s", lambda path, _: CacheSchedule.load(path))),
    Parser("SmoothCache", {"mlp": [1, 0, 1], "mlp-1": [1, 1, 0]},
           _json_of("s", lambda path, at: import_schedule(path, at.branches, 3))),
    Parser("routers", {"routers": [[0.5, 1.0], [0, 0.2], [1, 1]]},
           _json_of("s", lambda path, at: import_schedule(path, at.branches, 3))),
    Parser("steps_mask", {"steps_mask": [1, 0, 1]},
           _json_of("s", lambda path, at: import_schedule(path, at.branches, 3))),
    Parser("imported", with_digest(TABLE.to_json()),
           _json_of("s", lambda path, at: import_schedule(path, at.branches, 3))),
    Parser("timings", {"branches": [0.1, 0.2], "total": 5.0}, _json_of("t", lambda path, _: BranchTimings.load(path))),
    Parser("learned policy", to_json(GATES), lambda text, _: _usable(from_json(parse_json(text, "it"), "it"))),
    Parser("scheduled policy", to_json(Scheduled(TABLE)),
           lambda text, _: _usable(from_json(parse_json(text, "it"), "it"))),
    Parser("every n-th", to_json(EveryNth(4, 2)), lambda text, _: _usable(from_json(parse_json(text, "it"), "it"))),
    Parser("gates", _gates, _json_of(artifact.MANIFEST, lambda path, _: artifact.read(path.parent))),
    Parser("schedule variants", _saved(_variants, "schedule.json"),
           _json_of("schedule.json", lambda path, _: ScheduleVariants.load(path.parent))),
    Parser("ONNX metadata", json.loads(CONTRACT.to_json()),
           lambda text, _: OnnxMetadata.parse({KEY: text}).read_policy()),
    Parser("ONNX sizes", {"batch": 2}, lambda text, _: _example(Path("m.onnx"), {SIZES_KEY: text})),
    Parser("ONNX weights", {"places": {"a": [["w", True]]}, "contents": {"b": "float32 00"}}, _weights),
    Parser("sidecar", _saved(lambda folder: SIDECAR.save(folder / "m.engine"), "m.engine.json"), _sidecar),
    Parser("engine layers", INSPECTED, lambda text, _: parse_profiles(text)),
    Parser("build log", LOG, lambda text, _: parse_profiles(text)),
    Parser("tree spec", json.loads(CONTRACT.output_spec), lambda text, _: load_tree_spec(text, "it")),
    Parser("kept capture", _capture, _kept_capture),
    Parser("safetensors", _saved_tensors, _tensors),
    Parser("safetensors entry", with_digest({"metadata": {"a": "b"}, "tensors": ""}),
           lambda text, place: _tensors(_header(text), place)),
    Parser("search", {"model": "a"}, _json_of(IDENTITY, lambda path, _: Journal(path.parent, {"model": "a"}))),
    Parser("measured rows", {"settings": {"steps": 3}, "rows": [asdict(Row("a", 1.0))]},
           _json_of("r", lambda path, _: RowFile(path, Row, ["method"], {"steps": 3}).has(method="a"))),
    Parser("scheduler folder", {"_class_name": "DDIMScheduler", "beta_start": 0.1},
           _json_of("scheduler_config.json", lambda path, _: make_scheduler("", path.parent))),
    Parser("Triton", b'backend: "onnxruntime"\ndefault_model_filename: "model.0123abcd.onnx"\n',
           lambda text, place: model_file(place.file("config.pbtxt", text).parent)),
)  # fmt: skip


def _header(entry: str) -> bytes:
    content = json.dumps({"__metadata__": {"lazy_compile": entry}}).encode()
    return len(content).to_bytes(8, "little") + content


def options(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate,
        Phase.shrink],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip


def check(parser: Parser, place: Place, count: int) -> int:
    """How many of the examples were read."""
    valid = parser.valid(place) if callable(parser.valid) else parser.valid
    read = 0

    @options(count)
    @given(given_of(valid), st.booleans())
    def one(given: Any, verify: bool) -> None:
        nonlocal read
        try:
            with time_limit(20), warnings.catch_warnings(), verification(verify):
                warnings.simplefilter("ignore")
                parser.read(given, place)
            read += 1
        except LazyCompileError as error:
            message = str(error).replace(str(place.folder), "")
            assert len(message.splitlines()) == 1, message
            assert len(message) <= LONGEST, message

    one()
    return read


@pytest.fixture
def place(shop: Workshop, tmp_path: Path) -> Place:
    return Place(tmp_path, shop)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_it_is_read_or_refused_in_one_line(parser: Parser, place: Place) -> None:
    valid = parser.valid(place) if callable(parser.valid) else parser.valid
    if parser.name not in ("MODEL", "safetensors entry", "Triton"):
        with verification(True):
            parser.read(valid if isinstance(valid, str | bytes) else json.dumps(valid), place)
    check(parser, place, FEW)


@pytest.mark.fuzz
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_five_thousand_of_each(parser: Parser, place: Place) -> None:
    print(f"{parser.name}: {check(parser, place, MANY)} of {MANY} were read")
