"""ONNX files that are what was written: a digest at their end, and weights beside them and nowhere else.

A sealed file ends with one more entry of ``ModelProto.metadata_props``, of a fixed size, whose value is the digest of
all bytes before it and of the bytes in other files that its weights are read from. So it is written and held against
its content in one streaming pass, however large a model is, and stays an ONNX file for every other tool.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lazy_compile.backends.onnx.metadata import KEY, UNSEALED
from lazy_compile.digests import RESTORE, RangeDigests, digest_of, digest_of_file, verifies
from lazy_compile.errors import ArtifactError, import_optional, shown
from lazy_compile.storage import regular_file, shown_path

DIGEST_KEY = "lazy_compile.digest"

PROLOGUE_KEY = "lazy_compile.prologue"
"""The entry of ``ModelProto.metadata_props`` of a prologue; its value is the digest of what the file computes."""

MAX_BYTES = 2**31
"""No protobuf message is longer."""

_ENTRY = bytes([10, len(DIGEST_KEY), *DIGEST_KEY.encode(), 18, 64])
_TRAILER = bytes([14 << 3 | 2, len(_ENTRY) + 64]) + _ENTRY
"""In front of the 64 digits: field 14 of ModelProto, a key and a value."""

TRAILER_BYTES = len(_TRAILER) + 64


@dataclass(frozen=True)
class Range:
    """Where the bytes of a weight stand that lies in another file."""

    file: Path
    offset: int
    length: int


def seal(path: Path, places: RangeDigests | None = None) -> str:
    """Append the digest of an ONNX file that was just written; returns it.

    Args:
        path: the file, its weights beside it.
        places: digests that are known already.
    """
    unseal(path)
    return _append(path, _ranges(path, _parse(path)), places)


def seal_opaque(path: Path) -> str:
    """The same for a file that reads no other one, such as ``.ort``."""
    return _append(path, [], None)


def _append(path: Path, ranges: list[Range], places: RangeDigests | None) -> str:
    digest = _digest(path, path.stat().st_size, ranges, places or RangeDigests())
    with path.open("ab") as file:
        file.write(_TRAILER + digest.encode())
    return digest


def unseal(path: Path) -> None:
    """Take the digest off a file that another tool is to change."""
    if seal_of(path) is not None:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - TRAILER_BYTES)


def seal_of(path: Path) -> str | None:
    """The digest that a file carries; None if it carries none.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TRAILER_BYTES, 0))
            end = file.read(TRAILER_BYTES)
    except OSError as error:
        raise ArtifactError(f"cannot read {shown_path(path)}: {error.strerror or error}") from error
    digits = end[len(_TRAILER) :]
    sealed = end.startswith(_TRAILER) and len(digits) == 64 and set(digits) <= set(b"0123456789abcdef")
    return digits.decode() if sealed else None


def check_file(path: Path, places: RangeDigests | None = None) -> None:
    """Look at a file before another library does: ``.onnx``, or ``.ort``, which has no weights elsewhere.

    Raises:
        ArtifactError: it cannot be read as ONNX, it reads weights from outside its folder, or it is not what was
            written.
    """
    if path.suffix == ".ort":
        regular_file(path)
        _check_seal(path, [], places, required=True)
    else:
        read_proto(path, places)


def read_proto(path: Path, places: RangeDigests | None = None) -> Any:
    """The ``onnx.ModelProto`` of a file, its large weights left where they lie; for the errors see :func:`check_file`.

    A file that :func:`~lazy_compile.backends.onnx.export.export_onnx` did not write need not carry a digest.
    """
    proto = _parse(regular_file(path, MAX_BYTES))
    ranges = _ranges(path, proto)
    ours = any(_carries_digests(entry) for entry in proto.metadata_props)
    _check_seal(path, ranges, places, required=ours)
    return proto


def _carries_digests(entry: Any) -> bool:
    """Whether an entry is of a release that seals its files: the first ones did not."""
    return bool(entry.key == PROLOGUE_KEY or (entry.key == KEY and f'"version": {UNSEALED}' not in entry.value[:32]))


def data_files(path: Path) -> set[str]:
    """Names of the files beside a model that it reads weights from; none if it cannot be read."""
    try:
        return {place.file.name for place in _ranges(path, _parse(regular_file(path, MAX_BYTES)))}
    except ArtifactError:
        return set()


def properties_of(proto: Any) -> dict[str, str]:
    """What a model says about itself, its digest left out."""
    return {entry.key: entry.value for entry in proto.metadata_props if entry.key != DIGEST_KEY}


def _parse(path: Path) -> Any:
    onnx = import_optional("onnx", "onnx")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's, and the operating system's
        raise ArtifactError(f"cannot read {path} as ONNX ({shown(error)}); export the model again") from error
    entries = [*proto.metadata_props, *(entry for tensor in _tensors(proto) for entry in tensor.external_data)]
    if any(isinstance(text, bytes) for entry in entries for text in (entry.key, entry.value)):
        raise ArtifactError(f"cannot read {path} as ONNX (it holds text that is not UTF-8); export the model again")
    return proto


def _check_seal(path: Path, ranges: list[Range], places: RangeDigests | None, *, required: bool) -> None:
    if not verifies():
        return
    seen = seal_of(path)
    if seen is None:
        if required:
            raise ArtifactError(
                f"{path} carries no digest at its end, so another tool changed it after export_onnx; {RESTORE}"
            )
    elif seen != _digest(path, path.stat().st_size - TRAILER_BYTES, ranges, places or RangeDigests()):
        beside = " or the weights beside it" if ranges else ""
        raise ArtifactError(f"{path}{beside}: not what was written, the digest does not match; {RESTORE}")


def _digest(path: Path, length: int, ranges: list[Range], places: RangeDigests) -> str:
    parts = [digest_of_file(path, 0, length)]
    parts += [places.of(place.file, place.offset, place.length) for place in ranges]
    return digest_of("".join(parts).encode())


def _ranges(path: Path, proto: Any) -> list[Range]:
    """Of all weights that lie in other files, in the order of the file."""
    onnx = import_optional("onnx", "onnx")
    found = []
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = _beside(path, entries.get("location", ""))
        size = regular_file(file).stat().st_size
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", size - offset))
        except ValueError as error:
            raise ArtifactError(f"{path}: a weight lies at {shown(error)}; export the model again") from error
        if offset < 0 or length < 0 or offset + length > size:
            raise ArtifactError(
                f"{path} reads {length} bytes at {offset} of {file.name}, which has {size}; export the model again"
            )
        found.append(Range(file, offset, length))
    return found


def _beside(path: Path, location: str) -> Path:
    """
    Raises:
        ArtifactError: it lies outside of the folder.
    """
    folder = path.parent
    parts = PurePosixPath(location).parts
    file = folder.joinpath(*parts) if parts and "\0" not in location else folder
    inside = parts and not PurePosixPath(location).is_absolute() and ".." not in parts and "\\" not in location
    place = Path(os.path.realpath(file))  # Path.resolve() fails where links go round in a circle
    if not inside or len(location) > 255 or not place.is_relative_to(os.path.realpath(folder)):
        raise ArtifactError(
            f"{path} reads weights from {shown(location)}; expected a file in its own folder: export the model again"
        )
    return file


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors in a message, those of inner graphs and of attributes too."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.name in _HOLD_TENSORS:
            for item in value if field.is_repeated else [value]:
                yield from _tensors(item)


_HOLD_TENSORS = frozenset(
    {
        "GraphProto", "NodeProto", "AttributeProto", "FunctionProto", "TensorProto", "SparseTensorProto",
        "TrainingInfoProto",
    }
)  # fmt: skip
