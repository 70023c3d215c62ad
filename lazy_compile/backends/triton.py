"""Model repositories for the Triton Inference Server: caches as implicit state, one sequence for each trajectory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lazy_compile.backends.onnx.embedded_policy import NEXT_STEP, START, STEP, add_start, embed_policy, sizes_of
from lazy_compile.backends.onnx.metadata import KEY, SIZES_KEY, OnnxMetadata, first_line
from lazy_compile.backends.onnx.save import save_model
from lazy_compile.backends.onnx.sealed_file import DIGEST_KEY, data_files, read_proto, seal_of
from lazy_compile.backends.onnx.sizes import Sizes, value_at
from lazy_compile.backends.tensorrt.build import build_engine, builder_for
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.sidecar import path_beside
from lazy_compile.digests import digest_of, digest_of_file, verification
from lazy_compile.errors import ArtifactError, ConfigError, import_optional, shown
from lazy_compile.policies.policy import AlwaysCompute, Policy
from lazy_compile.policies.serialize import to_json
from lazy_compile.storage import atomic_path, locked_folder, regular_file, superseding

if TYPE_CHECKING:
    from onnx_ir import Model, Value

Backend = Literal["onnxruntime", "tensorrt"]

TYPES = {
    "FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "INT64": "TYPE_INT64", "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
}  # fmt: skip


_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_TENSOR_NAME = re.compile(r"[\w.:/\[\]-]{1,200}", re.ASCII)
"""Nothing that ends a string of config.pbtxt."""

CONFIG = "config.pbtxt"
VERSION = "1"
_FILE_NAME = re.compile(r'^default_model_filename: "(?P<name>model\.[0-9a-f]{8}\.(onnx|plan))"$', re.MULTILINE)


@dataclass(frozen=True)
class TritonReport:
    """What was written.

    Attributes:
        path: the model's folder in the repository.
        backend: which of Triton's backends runs it.
        inputs: what a request brings.
        outputs: what it gets.
        states: what the server keeps for each sequence.
        cache_bytes: of one sequence, as the server keeps it; where sizes are free, for the example call.
        embedded: whether the policy stands in the graph.
    """

    path: Path
    backend: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[str, ...]
    cache_bytes: int
    embedded: bool


def export_triton(
    onnx: str | Path,
    repository: str | Path,
    name: str,
    *,
    policy: Policy | None = None,
    embed_gates: bool = True,
    backend: Backend = "onnxruntime",
    build: BuildConfig | None = None,
    sequences: int = 16,
    idle_seconds: float = 60.0,
    verify: bool = True,
) -> TritonReport:
    """Write ``repository/name`` for Triton: ``config.pbtxt`` and the model that it names, as version 1.

    A trajectory is a sequence: its first request has ``sequence_start``, and the server keeps its caches until its
    last one or until it is idle for too long. The start is an input of the model, which forces every branch to compute,
    so what a server fills new states with is never read.

    Args:
        onnx: what ``export_onnx`` wrote with ``gating="predicate"`` or ``"input"``.
        repository: the folder of all models.
        name: of the model.
        policy: the rule that decides; None takes the one that the file carries.
        embed_gates: put the policy into the graph, so that a request brings nothing but what the original takes. Else
            every request brings its row of the gate table, or its decisions.
        backend: ``"tensorrt"`` builds an engine for the GPU at hand, which must be that of the server.
        build: options of that build.
        sequences: how many trajectories one instance of the model keeps at once.
        idle_seconds: after which an unfinished trajectory is given up.
        verify: False reads ``onnx`` without holding it against its digest.

    Raises:
        ConfigError: the policy and the gating do not go together, an option is out of range, or the model needs what a
            prologue computes.
        ArtifactError: the file was not written by ``export_onnx``, or the repository cannot be written to.
        BackendError: the engine cannot be built.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(map(repr, get_args(Backend)))}")
    if sequences < 1 or idle_seconds <= 0:
        raise ConfigError(f"sequences is {sequences}, idle_seconds is {idle_seconds}; use 1 or more, and more than 0")
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"name is {shown(name)}; it becomes a folder of the repository: use letters, digits, '_', '-' and '.'"
        )
    if backend == "tensorrt":
        builder_for(build or BuildConfig())
    with verification(verify):
        model, metadata = _read(Path(onnx))
    add_start(model)
    content = seal_of(Path(onnx)) or digest_of_file(Path(onnx))
    made_from = [content, backend, (build or BuildConfig()).options()]
    if embed_gates:
        embedded = policy or _policy_of(metadata)
        embed_policy(model, metadata, embedded)
        made_from.append(to_json(embedded))
    states = _states(model, metadata)
    folder = Path(repository) / name
    token = digest_of(json.dumps(made_from, sort_keys=True).encode())[:8]
    served = folder / VERSION / f"model.{token}{'.plan' if backend == 'tensorrt' else '.onnx'}"
    sizes = metadata.example
    lines = _config(name, backend, served.name, model, sizes, states, sequences, idle_seconds)
    text = "\n".join(lines) + "\n"
    cache_bytes = sum(_bytes(value, sizes) for value, _ in states)
    with locked_folder(folder), superseding(served.with_name(CONFIG), _files_of(folder), _belonging(served)):
        if backend == "tensorrt":
            source = folder / "model.onnx"  # beside the versions, where the server does not look
            save_model(model, source)
            build_engine(source, served, replace(build or BuildConfig(), profiles=()))  # of these sizes
        else:
            _take_first_states(model, states)
            save_model(model, served)
        with atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(text)
    kept = {value for pair in states for value in pair}
    return TritonReport(
        folder,
        backend,
        tuple(str(value.name) for value in model.graph.inputs if value not in kept and value.name != START),
        tuple(str(value.name) for value in model.graph.outputs if value not in kept),
        tuple(str(value.name) for value, _ in states),
        cache_bytes,
        embed_gates,
    )


def model_file(folder: Path) -> tuple[str, Path]:
    """``config.pbtxt`` of a model, and the file that the server loads: a new one has a new name, so that the
    configuration decides at once which of two it is.

    Raises:
        ArtifactError: there is no configuration that can be read, or it names no file.
    """
    try:
        text = regular_file(folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {folder / CONFIG}: {shown(error)}; export the model again") from error
    named = _FILE_NAME.search(text)
    if named is None:
        raise ArtifactError(f"{folder / CONFIG} names no file that export_triton wrote; export the model again")
    return text, folder / VERSION / named["name"]


def _files_of(folder: Path) -> set[str]:
    """The files of the model that is served now; none if that is not one of ours."""
    with suppress(ArtifactError):
        return _belonging(model_file(folder)[1])
    return set()


def _belonging(served: Path) -> set[str]:
    beside = {path_beside(served).name} if served.suffix == ".plan" else data_files(served)
    return {served.name, *beside}


def _read(path: Path) -> tuple[Model, OnnxMetadata]:
    ir = import_optional("onnx_ir", "onnx")
    read_proto(path)
    try:
        model = ir.load(path)
    except Exception as error:
        raise ArtifactError(f"cannot read {path} as ONNX ({first_line(error)}); export the model again") from error
    metadata = OnnxMetadata.parse(model.metadata_props)
    if metadata.gating == "schedule":
        raise ConfigError(
            "a server keeps one model for a sequence, and gating='schedule' makes several; export with gating='input' "
            "and give the schedule as policy"
        )
    if metadata.invariants:
        raise ConfigError(
            f"{path} takes what its prologue computes, which a request to a server does not bring; export it without "
            "invariants (--invariant)"
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not _TENSOR_NAME.fullmatch(str(value.name)):
            raise ArtifactError(
                f"{path} has a tensor {shown(str(value.name))}, which config.pbtxt cannot name; rename the "
                "argument and export again"
            )
    # What it says about itself is no longer true of the result.
    del model.metadata_props[KEY]
    model.metadata_props.pop(DIGEST_KEY, None)
    if metadata.sizes:
        model.metadata_props[SIZES_KEY] = json.dumps(metadata.example)
    return model, metadata


def _policy_of(metadata: OnnxMetadata) -> Policy:
    """What the file says, with the options that no graph knows about.

    Raises:
        ConfigError: it was exported with such options.
    """
    policy = metadata.read_policy() or AlwaysCompute()
    if policy != AlwaysCompute() and (metadata.warmup_steps > 1 or metadata.max_reuse_age is not None):
        raise ConfigError(
            f"the exported {metadata.model} has warmup_steps or max_reuse_age, which no graph knows about; export it "
            "without them, or give embed_gates=False and let the client decide"
        )
    return policy


def _states(model: Model, metadata: OnnxMetadata) -> list[tuple[Value, Value]]:
    """What is kept between requests: input, and the output that is its next value."""
    pairs = {slot.input: slot.output for slot in metadata.slots} | {STEP: NEXT_STEP}
    outputs = {value.name: value for value in model.graph.outputs}
    return [
        (value, outputs[pairs[str(value.name)]])
        for value in model.graph.inputs
        if value.name in pairs and pairs[str(value.name)] in outputs
    ]


def _take_first_states(model: Model, states: Sequence[tuple[Value, Value]]) -> None:
    """Let a first state have one element along each free axis: ONNX Runtime reuses memory where sizes have one name,
    so those of states get names of their own, and what it takes for the others it finds out itself."""
    ir = import_optional("onnx_ir", "onnx")
    free = [value for value, _ in states if any(isinstance(size, str) for size in sizes_of(value))]
    for value in free:
        sizes = enumerate(sizes_of(value))
        value.shape = ir.Shape(size if isinstance(size, int) else f"{value.name}_{axis}" for axis, size in sizes)
    for node in ir.traversal.RecursiveGraphIterator(model.graph) if free else ():
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None


def _config(
    name: str,
    backend: Backend,
    file: str,
    model: Model,
    example: Sizes,
    states: Sequence[tuple[Value, Value]],
    sequences: int,
    idle_seconds: float,
) -> Iterator[str]:
    """``config.pbtxt``. There is no batch axis for the server: free sizes are -1 in ONNX Runtime, whose first states
    have one element along them, and those of the example call in an engine."""
    sizes = example if backend == "tensorrt" else None
    kept = {value for pair in states for value in pair}
    yield f'name: "{name}"'
    yield 'platform: "tensorrt_plan"' if backend == "tensorrt" else 'backend: "onnxruntime"'
    yield f'default_model_filename: "{file}"'
    yield "max_batch_size: 0"
    for role, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in (value for value in values if value not in kept and value.name != START):
            yield f'{role} {{ name: "{value.name}" data_type: {_type(value)} {_dims(_shape(value, sizes))} }}'
    yield "sequence_batching {"
    yield f"  max_sequence_idle_microseconds: {round(idle_seconds * 1e6)}"
    yield f"  oldest {{ max_candidate_sequences: {sequences} }}"
    yield f'  control_input {{ name: "{START}"'
    yield "    control { kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] } }"
    for given, following in states:
        kind, shape = f"data_type: {_type(given)}", _listed(_shape(given, sizes))
        start = _listed([1 if size == -1 else size for size in _shape(given, sizes)])
        yield f'  state {{ input_name: "{given.name}" output_name: "{following.name}" {kind} {shape}'
        yield f'    initial_state {{ name: "zero" {kind} {start} zero_data: true }} }}'
    yield "}"


def _dims(shape: Sequence[int]) -> str:
    return _listed(shape) if shape else "dims: [ 1 ] reshape { shape: [ ] }"


def _listed(shape: Sequence[int]) -> str:
    return f"dims: [ {', '.join(map(str, shape))} ]"


def _shape(value: Value, sizes: Sizes | None) -> list[int]:
    """The sizes of a value; -1 for one that is free, if ``sizes`` does not say what it is."""
    return [
        size if isinstance(size, int) else -1 if sizes is None else value_at(size, sizes) for size in sizes_of(value)
    ]


def _type(value: Value) -> str:
    name = str(value.dtype.name if value.dtype is not None else "FLOAT")
    if name not in TYPES:
        raise ConfigError(f"{value.name} is of type {name}, which a server does not take; expected {', '.join(TYPES)}")
    return TYPES[name]


def _bytes(value: Value, sizes: Sizes) -> int:
    count: Any = 1
    for size in _shape(value, sizes):
        count *= size
    return int(count * (value.dtype.itemsize if value.dtype is not None else 4))
