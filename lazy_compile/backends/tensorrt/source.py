"""The ONNX file that an engine is built from: what goes in and out, where its heavy nodes stand, what identifies it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lazy_compile.backends.onnx.metadata import KEY, SIZES_KEY, OnnxMetadata, first_line
from lazy_compile.backends.onnx.prologue import PROLOGUE_KEY, check_prologue, find_prologue
from lazy_compile.backends.onnx.sealed_file import DIGEST_KEY, properties_of, read_proto
from lazy_compile.backends.onnx.sizes import Size, names_in
from lazy_compile.backends.onnx.structure import heavy_nodes
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.digests import digest_of, digest_of_file
from lazy_compile.errors import ArtifactError, import_optional, one_line
from lazy_compile.storage import parse_json


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file.

    Attributes:
        path: where it lies.
        tensors: its inputs and outputs; free sizes are -1.
        dims: shapes of its inputs; a free size is a formula over names.
        nodes: names of the heavy nodes by conditional, ``""`` for those in none.
        model: the contract of a lazy model; None if ``export_onnx`` did not write the file, or as a prologue.
        prologue: the digest of a prologue; empty if it is none.
        example: its free sizes in the example call, where the file says them.
        weight_bytes: of all weights, wherever they lie.
        content: the digest of all that it holds; names of files with weights, which are drawn anew at every export, do
            not count.
    """

    path: Path
    tensors: tuple[EngineTensor, ...]
    dims: dict[str, tuple[Size, ...]]
    nodes: dict[str, tuple[str, ...]]
    model: OnnxMetadata | None
    prologue: str
    example: dict[str, int]
    weight_bytes: int
    content: str

    @classmethod
    def read(cls, path: str | Path) -> OnnxSource:
        """
        Raises:
            ArtifactError: it cannot be read.
        """
        path = Path(path)
        proto = read_proto(path)
        try:
            nodes = heavy_nodes(proto)
            tensors, dims = tuple(_tensors(proto.graph)), dict(_dims(proto.graph))
            weight_bytes = sum(map(_bytes, proto.graph.initializer))
            digest = _digest(proto, path.parent)
        except Exception as error:  # protobuf's, and the operating system's
            raise ArtifactError(f"cannot read {path} as ONNX ({first_line(error)}); export the model again") from error
        properties = properties_of(proto)
        model = OnnxMetadata.parse(properties) if KEY in properties else None
        example = _example(path, properties) if model is None else model.example
        return cls(path, tensors, dims, nodes, model, properties.get(PROLOGUE_KEY, ""), example, weight_bytes, digest)

    def read_prologue(self) -> OnnxSource | None:
        """The prologue that belongs to this file; None if it needs none.

        Raises:
            ArtifactError: it is missing, or that of another model.
        """
        beside = None if self.model is None else find_prologue(self.path, self.model)
        if beside is None or self.model is None:
            return None
        found = OnnxSource.read(beside)
        check_prologue(beside, found.prologue, self.path, self.model)
        return found

    def require_lazy(self) -> OnnxMetadata:
        """The contract of the lazy model.

        Raises:
            ArtifactError: this is another ONNX model.
        """
        if self.model is None:
            raise ArtifactError(
                f"{self.path} was not written by export_onnx and says nothing about branches and caches; export the "
                "model with lazy-compile export, or give --any-onnx to build it as it is"
            )
        return self.model


def _example(path: Path, properties: Mapping[str, str]) -> dict[str, int]:
    """What a file without a contract says of its sizes."""
    try:
        values = parse_json(properties.get(SIZES_KEY, "{}"), f"the sizes in {path}")
        return {str(name): int(size) for name, size in values.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the sizes in {path} are damaged ({one_line(repr(error))}); export it again") from error


def _dims(graph: Any) -> Iterator[tuple[str, tuple[Size, ...]]]:
    weights = {item.name for item in graph.initializer}
    for value in (value for value in graph.input if value.name not in weights):
        sizes = enumerate(value.type.tensor_type.shape.dim)
        yield value.name, tuple(_size(size, f"{value.name}_{axis}") for axis, size in sizes)


def _size(size: Any, otherwise: str) -> Size:
    """A number or a formula; what another exporter called a size becomes a name."""
    if size.HasField("dim_value"):
        return int(size.dim_value)
    text = size.dim_param or otherwise
    try:
        names_in(text)
    except ValueError:
        return f"size_{re.sub(r'[^A-Za-z0-9_]', '_', text)}"
    return str(text)


def _digest(proto: Any, folder: Path) -> str:
    """See :attr:`OnnxSource.content`; the names and the digest are taken out of ``proto``."""
    parts = []
    entries = [entry for item in proto.graph.initializer for entry in item.external_data if entry.key == "location"]
    for name in sorted({str(entry.value) for entry in entries}):
        parts.append(digest_of_file(folder / name).encode())
    for entry in entries:
        entry.value = ""
    kept = [item for item in proto.metadata_props if item.key != DIGEST_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    return digest_of(*parts, proto.SerializeToString(deterministic=True))


def _bytes(weight: Any) -> int:
    onnx = import_optional("onnx", "onnx")
    return int(prod(weight.dims)) * int(onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)


def _tensors(graph: Any) -> list[EngineTensor]:
    onnx = import_optional("onnx", "onnx")
    weights = {item.name for item in graph.initializer}
    found = []
    for is_input, values in ((True, graph.input), (False, graph.output)):
        for value in (value for value in values if value.name not in weights):
            kind = value.type.tensor_type
            dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim)
            found.append(EngineTensor(value.name, is_input, dtype, shape))
    return found
