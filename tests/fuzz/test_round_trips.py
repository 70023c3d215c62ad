"""What is written is read as it was, for whatever can be written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fuzz.artefacts import Workshop
from fuzz.test_parsers import BRANCHES, CONTRACT, FEW, MANY, SIDECAR, Place, options
from fuzz.texts import ANY_TEXT, JSON
from lazy_compile import CacheSchedule, GateTable, LazyConfig, Learned, Scheduled
from lazy_compile.backends.onnx.formulas import size_symbol, written
from lazy_compile.backends.onnx.metadata import KEY, FreeSize, OnnxMetadata
from lazy_compile.backends.onnx.sizes import ShapeRange, at_sizes, holds, parse_ranges, value_at
from lazy_compile.backends.tensorrt.layers import EngineLayer, parse_layers
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from lazy_compile.capture.written_guards import check_guard
from lazy_compile.capture.written_sizes import SizeReader, SizeWriter
from lazy_compile.cli.models import _parse_shape, parse_options
from lazy_compile.cli.pipelines import call_arguments, read_prompts
from lazy_compile.config import BatchRule, CacheDtype, ReuseArm
from lazy_compile.integrations.comfyui import StepMask, policy_of
from lazy_compile.planning.estimate import parse_bytes
from lazy_compile.planning.import_schedule import import_schedule
from lazy_compile.planning.timings import BranchTimings
from lazy_compile.policies.policy import AlwaysCompute, Policy
from lazy_compile.policies.presets import EveryNth
from lazy_compile.policies.serialize import from_json, to_json
from lazy_compile.runtime import artifact
from lazy_compile.storage import load_sealed_json, load_tensors, parse_json, save_json, save_sealed_json, save_tensors
from lazy_compile.tree_specs import load_tree_spec

NAMES = st.from_regex(r"[a-z]\w{0,8}", fullmatch=True)
SHAPES = st.lists(st.integers(1, 10**6), min_size=1, max_size=5).map(tuple)
FINITE = st.floats(-1e6, 1e6)
SMALL = st.integers(1, 10)


@st.composite
def schedules(draw: st.DrawFn, branches: int | None = None, steps: int | None = None) -> CacheSchedule:
    rows, columns = steps or draw(st.integers(1, 6)), branches or draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=columns, max_size=columns)
    table = [[True] * columns, *draw(st.lists(row, min_size=rows - 1, max_size=rows - 1))]
    slopes = st.lists(st.lists(FINITE, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    found = draw(st.none() | slopes)
    return CacheSchedule(np.array(table), None if found is None else np.array(found))


@st.composite
def gates(draw: st.DrawFn) -> Learned:
    features, rows = [branch.gate_features for branch in BRANCHES], draw(st.integers(1, 4))
    single = st.floats(-1e6, 1e6, width=32)

    def tensor(columns: int, numbers: st.SearchStrategy[float] = single) -> torch.Tensor:
        return torch.tensor(
            draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
        )

    linear = draw(st.booleans())
    table = GateTable(
        tuple(features), tensor(1, FINITE).double()[:, 0], tensor(sum(features)), tensor(2),
        "linear" if linear else "nearest", tensor(2) if draw(st.booleans()) else None,
        None if linear or draw(st.booleans()) else torch.zeros(rows, dtype=torch.int64),
    )  # fmt: skip
    return Learned(table, draw(FINITE), draw(st.booleans()))


POLICIES = st.one_of(
    st.just(AlwaysCompute()), st.builds(EveryNth, SMALL, SMALL), st.builds(Scheduled, schedules(branches=2)), gates(),
    st.text("01", max_size=9).map(lambda rest: StepMask(f"1{rest}")),
)  # fmt: skip

CONFIGS = st.builds(
    LazyConfig, reuse=st.sampled_from(get_args(ReuseArm)), order=st.integers(1, 3), warmup_steps=SMALL,
    max_reuse_age=st.none() | SMALL, batch_rule=st.sampled_from(get_args(BatchRule)), group=SMALL | st.just("block"),
    granularity=SMALL | st.sampled_from(("block", "model")), probe=st.sampled_from((None, "first_block")),
    cache_dtype=st.none() | st.sampled_from(get_args(CacheDtype)), cache_device=st.none() | st.just("cpu"),
    max_cache_bytes=st.none() | st.integers(1, 2**60), conv_branches=st.booleans(), timestep_input=st.none() | NAMES,
    hoist_step_invariants=st.booleans(), max_captures=SMALL,
)  # fmt: skip

FORMULAS = st.recursive(
    st.sampled_from(("height", "width")) | st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(("+", "-", "*", "//", "%")), inner).map(lambda parts: f"({''.join(parts)})"),
        st.tuples(st.sampled_from(("min", "max")), inner,
        inner).map(lambda parts: f"{parts[0]}({parts[1]}, {parts[2]})"),
        inner.map(lambda part: f"(-{part})"),
    ),
    max_leaves=8,
)  # fmt: skip
SIZES = st.fixed_dictionaries({"height": st.integers(1, 64), "width": st.integers(1, 64)})
SYMBOLS = [size_symbol(name) for name in ("height", "width")]
EXPRESSIONS = st.recursive(
    st.sampled_from(SYMBOLS) | st.integers(1, 9).map(sympy.Integer),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda parts: parts[0] + parts[1]),
        st.tuples(inner, inner).map(lambda parts: parts[0] * parts[1]),
        st.tuples(inner, st.integers(1, 9)).map(lambda parts: sympy.floor(parts[0] / parts[1])),
        st.tuples(inner, st.integers(1, 9)).map(lambda parts: sympy.Mod(parts[0], parts[1])),
        st.tuples(inner, inner).map(lambda parts: sympy.Max(*parts)),
    ),
    max_leaves=5,
)  # fmt: skip

LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
TREES = st.recursive(
    st.just(0), lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(ANY_TEXT, inner,
    max_size=3),
    max_leaves=6,
)  # fmt: skip
LINES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=20)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def _finite(values: Any) -> Any:
    """The same JSON with 0 for what is no finite number."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return 0.0 if isinstance(values, float) and not math.isfinite(values) else values


FINITE_JSON = JSON.map(_finite)


@dataclass(frozen=True)
class Trip:
    """``back(value, place)`` writes a value, and returns what is read."""

    name: str
    values: st.SearchStrategy[Any]
    back: Callable[[Any, Place], Any]


def _through(name: str, write: Callable[[Path, Any], Any], read: Callable[[Path], Any]) -> Callable[[Any, Place], Any]:
    def back(value: Any, place: Place) -> Any:
        write(place.folder / name, value)
        return read(place.folder / name)

    return back


def _policy(value: Any, place: Place) -> Any:
    return from_json(parse_json(json.dumps(to_json(value)), "it"), "it")


def _artifact(value: Any, place: Place) -> Any:
    config, policy = value
    kept = artifact.Artifact(config, policy, "0" * 64, "export", ("a\nb",), ("mask",), artifact.describe(BRANCHES))
    artifact.write(place.folder, kept)
    found = artifact.read(place.folder)
    assert replace(found, policy=policy, directory=None) == kept
    return found.config, found.policy


def _spelled(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())]


def _options(value: LazyConfig, place: Place) -> LazyConfig:
    return parse_options([f"{item.name}={getattr(value, item.name)}" for item in fields(value)])


def _imported(form: Callable[[CacheSchedule], Any]) -> Callable[[Any, Place], Any]:
    def back(value: CacheSchedule, place: Place) -> Any:
        save_json(place.folder / "s.json", form(value))
        return import_schedule(place.folder / "s.json", BRANCHES, value.steps)

    return back


def _smoothcache(value: CacheSchedule) -> Any:
    return {f"mlp-{index}": column.astype(int).tolist() for index, column in enumerate(value.should_compute.T)}


def _layers(value: tuple[EngineLayer, ...], place: Place) -> Any:
    described = [
        {"Name": each.name, "LayerType": each.kind, "Inputs": [{"Name": name} for name in each.inputs],
         "Outputs": [{"Name": name} for name in each.outputs], "TacticName": each.tactic}
        for each in value
    ]  # fmt: skip
    return parse_layers(json.dumps({"Layers": described}))


def _contract(value: tuple[Any, ...], place: Place) -> Any:
    sizes, policy, name, age = value
    contract = replace(CONTRACT, sizes=sizes, policy=to_json(policy), model=name, max_reuse_age=age)
    found = OnnxMetadata.parse({KEY: contract.to_json()})
    assert replace(found, policy=None) == replace(contract, policy=None)
    return found.sizes, found.read_policy(), found.model, found.max_reuse_age


def _sidecar(value: Any, place: Place) -> Any:
    layers, tensors, policy = value
    sidecar = replace(SIDECAR, layers=layers, tensors=tensors, written_policy=to_json(policy))
    sidecar.save(place.folder / "m.engine")
    found = EngineSidecar.load(place.folder / "m.engine")
    assert found.model == replace(CONTRACT, policy=None)
    return found.layers, found.tensors, found.policy


def _formula(value: Any, place: Place) -> Any:
    """Python says what it is; a part of the sizes may be put in first."""
    text, sizes = value
    try:
        expected = eval(text, {"min": min, "max": max}, dict(sizes))
    except ZeroDivisionError:
        assert not holds(f"{text} == 0", sizes)
        return value
    assert value_at(text, sizes) == value_at(at_sizes(text, {"height": sizes["height"]}), sizes) == expected
    assert holds(f"{text} == {expected}", sizes)
    return value


def _expression(value: Any, place: Place) -> Any:
    expression, sizes = value
    text = written(expression, {str(symbol): symbol for symbol in SYMBOLS})
    assert value_at(text, sizes) == expression.subs({symbol: sizes[str(symbol)] for symbol in SYMBOLS})
    return value


def _size_text(value: Any, place: Place) -> Any:
    writer = SizeWriter()
    number = writer.number(value)
    reader = SizeReader(parse_json(json.dumps(writer.table), "it"), None)
    return reader._expressions[number]


LAYERS = st.lists(
    st.builds(EngineLayer, TEXTS, NAMES, st.lists(TEXTS, max_size=2).map(tuple),
    st.lists(TEXTS, max_size=2).map(tuple), TEXTS),
    min_size=1, max_size=4,
).map(tuple)  # fmt: skip
FREE = st.builds(lambda a, b, c: (FreeSize("batch", a, 1, a + b), FreeSize("height", 2 * c)), SMALL, SMALL, SMALL)
PROFILES = st.lists(st.lists(SHAPES, min_size=3, max_size=3).map(tuple), max_size=2).map(tuple)
TENSORS = st.lists(st.builds(EngineTensor, NAMES, st.booleans(), NAMES, SHAPES, PROFILES), max_size=3).map(tuple)
NUMBERS = st.lists(st.floats(width=32), max_size=4).map(torch.tensor)
RANGES = st.dictionaries(NAMES, SHAPES, min_size=1, max_size=3)
TABLES = schedules(branches=2).map(lambda found: CacheSchedule(found.should_compute))

TRIPS = (
    Trip("JSON", FINITE_JSON, lambda value, _: parse_json(json.dumps(value), "it")),
    Trip("sealed JSON", st.dictionaries(NAMES, FINITE_JSON), _through("s", save_sealed_json, load_sealed_json)),
    Trip("schedule", schedules(),
         lambda value, _: CacheSchedule.from_json(parse_json(json.dumps(value.to_json()), "it"))),
    Trip("policy", POLICIES, _policy),
    Trip("gates", st.tuples(CONFIGS, POLICIES), _artifact),
    Trip("--set", CONFIGS, _options),
    Trip("--shape", st.tuples(NAMES, SHAPES.filter(lambda shape: math.prod(shape) < 2**34),
         st.sampled_from((torch.int64, torch.bfloat16))),
         lambda value, _: _parse_shape(f"{_spelled({value[0]: value[1]})[0]}:{str(value[2])[6:]}")),
    Trip("--minShapes", st.tuples(RANGES, RANGES).map(lambda pair: (ShapeRange(pair[0], {}, pair[1]),)),
         lambda value, _: parse_ranges(_spelled(value[0].min), [], _spelled(value[0].max))),
    Trip("--call", st.dictionaries(NAMES.filter(str.isidentifier), LITERALS),
         lambda value, _: call_arguments([f"{name}={item!r}" for name, item in value.items()])),
    Trip("--max-memory", st.integers(1, 2**50), lambda value, _: parse_bytes(f"{value}")),
    Trip("--max-memory in units", st.integers(1, 10**6).map(lambda count: count * 2**30),
         lambda value, _: parse_bytes(f"{value // 2**30} GiB")),
    Trip("--prompts", st.lists(LINES.map(str.strip).filter(bool), min_size=1),
         _through("p", lambda path, lines: path.write_text("\n".join(lines), encoding="utf-8"), read_prompts)),
    Trip("ComfyUI's schedule", st.text("01", max_size=9).map(lambda rest: StepMask(f"1{rest}")),
         lambda value, _: policy_of(", ".join(value.mask))),
    Trip("own schedule, imported", TABLES, _imported(CacheSchedule.to_json)),
    Trip("SmoothCache", TABLES, _imported(_smoothcache)),
    Trip("routers", TABLES, _imported(lambda value: {"routers": value.should_compute.astype(float).tolist()})),
    Trip("steps_mask", TABLES.map(lambda found: found.of([0, 0])),
         _imported(lambda value: {"steps_mask": value.should_compute[:, 0].astype(int).tolist()})),
    Trip("timings", st.lists(st.floats(0, 10), max_size=4),
         _through("t", lambda path, value: save_json(path, {"branches": value, "total": 50}),
         lambda path: BranchTimings.load(path).branches.tolist())),
    Trip("tree spec", TREES.map(pytree.tree_structure),
         lambda value, _: load_tree_spec(pytree.treespec_dumps(value), "it")),
    Trip("ONNX metadata", st.tuples(FREE, POLICIES, NAMES, st.none() | SMALL), _contract),
    Trip("sidecar", st.tuples(LAYERS, TENSORS, POLICIES), _sidecar),
    Trip("engine layers", LAYERS.filter(lambda layers: not any("[profile" in str(each) for each in layers)), _layers),
    Trip("formula", st.tuples(FORMULAS, SIZES), _formula),
    Trip("size of torch's", st.tuples(EXPRESSIONS, SIZES), _expression),
    Trip("number of a capture",
         st.integers(-2**70,
         2**70).map(sympy.Integer) | st.fractions().map(lambda value: sympy.Rational(value.numerator,
         value.denominator)), _size_text),
    Trip("guard",
         FORMULAS.map(lambda text: f"{text.replace('height', 'L[0].size()[1]').replace('width', 'L[1].dim()')} > 2"),
         lambda value, _: check_guard(value, "it")),
    Trip("safetensors", st.dictionaries(NAMES, NUMBERS),
         _through("c", save_tensors, lambda path: load_tensors(path)[0])),
)  # fmt: skip


def plain(value: Any) -> Any:
    """What can be compared: policies and gate tables by their fields, tensors by their bits."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, Policy | GateTable):
        return type(value), {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.init}  # type: ignore[arg-type]
    return value


def check(trip: Trip, place: Place, count: int) -> None:
    @options(count)
    @given(trip.values)
    def one(value: Any) -> None:
        assert plain(trip.back(value, place)) == plain(value)

    one()


@pytest.mark.parametrize("trip", TRIPS, ids=lambda trip: trip.name)
def test_it_is_read_as_it_was_written(trip: Trip, shop: Workshop, tmp_path: Path) -> None:
    check(trip, Place(tmp_path, shop), FEW)


@pytest.mark.fuzz
@pytest.mark.parametrize("trip", TRIPS, ids=lambda trip: trip.name)
def test_five_thousand_of_each(trip: Trip, shop: Workshop, tmp_path: Path) -> None:
    check(trip, Place(tmp_path, shop), MANY)
