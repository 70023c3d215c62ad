"""Writing exported models: checked first, complete or absent, with large weights in a file of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lazy_compile.backends.onnx.metadata import Gating, first_line
from lazy_compile.backends.onnx.prologue import PROLOGUE_KEY, prologue_path, waiting_path
from lazy_compile.backends.onnx.sealed_file import data_files, seal
from lazy_compile.digests import RangeDigests
from lazy_compile.errors import ArtifactError, BackendError, import_optional
from lazy_compile.storage import atomic_path, locked_folder, remove_files, superseding, token_of

if TYPE_CHECKING:
    from onnx_ir import Model

OPSETS = range(18, 23)
"""From 23 on the exporter keeps ``Attention`` whole, which TensorRT does not build inside an ``If``."""

EXTERNAL_BYTES = 2_000_000_000
"""Weights above this go to a file of their own: a protobuf message ends at 2 GiB."""


def save_model(model: Model, path: Path, places: RangeDigests | None = None) -> int:
    """Write and check a model; the size of its files in bytes.

    Args:
        model: the model; its own file is replaced last, so an older one and its weights stay together until then.
        path: where to.
        places: digests of shared weights that are known already.
    """
    with written_model(model, path, places) as size:
        return size


def save_pair(model: Model, prologue: Model | None, path: Path, gating: Gating) -> int:
    """Write a model, and the prologue that computes some of its inputs; the size of all files in bytes.

    The old pair is usable until the moment at which the model is replaced, and the new one from then on.
    """
    if prologue is None:
        return save_model(model, path)
    waiting = waiting_path(path, gating, prologue.metadata_props[PROLOGUE_KEY])
    beside = prologue_path(path, gating)
    with locked_folder(path.parent), superseding(beside, _own_data(beside, data_files(beside)), [waiting.name]):
        try:
            with written_model(model, path) as size:
                size += save_model(prologue, waiting)
        except BaseException:
            remove_files(path.parent, {waiting.name, *data_files(waiting)})
            raise
        put_in_place(waiting, beside)
    return size


def put_in_place(waiting: Path, final: Path) -> None:
    """Give a file its own name; it was usable under the other one too.

    Raises:
        ArtifactError: the folder cannot be written to.
    """
    try:
        os.replace(waiting, final)
    except OSError as error:
        raise ArtifactError(f"cannot write {final}: {error.strerror or error}; write it again") from error


@contextmanager
def written_model(model: Model, path: Path, places: RangeDigests | None = None) -> Iterator[int]:
    """Write and check a temporary file, and give it its name when the block ends well. The weights' name is new each
    time, so an older model and its weights stay together until then."""
    ir, onnx = import_optional("onnx_ir", "onnx"), import_optional("onnx", "onnx")
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    external = sum(tensor.nbytes for tensor in weights if not isinstance(tensor, ir.ExternalTensor)) > EXTERNAL_BYTES
    data: Path | None = None
    try:
        with (
            locked_folder(path.parent),
            superseding(path, _own_data(path, data_files(path))),
            atomic_path(path) as temporary,
        ):
            data = path.with_name(f"{path.stem}.{token_of(temporary)}.data") if external else None
            ir.save(model, temporary, external_data=None if data is None else data.name)
            onnx.checker.check_model(str(temporary), full_check=True)
            seal(temporary, places)
            yield temporary.stat().st_size + (0 if data is None else data.stat().st_size)
    except BaseException as error:
        if data is not None:
            data.unlink(missing_ok=True)
        if isinstance(error, onnx.checker.ValidationError | onnx.shape_inference.InferenceError):
            raise BackendError(
                f"the exported model is not valid ONNX: {first_line(error)}; try opset={OPSETS[-1]} (bfloat16 needs "
                "it), or another dtype"
            ) from error
        raise


def _own_data(path: Path, names: set[str]) -> set[str]:
    """Those of the files that a model read its weights from which were written for it alone."""
    stems = (path.stem, path.stem.lstrip("."))
    return {name for name in names if name.endswith(".data") and any(_is_own(name, stem) for stem in stems)}


def _is_own(name: str, stem: str) -> bool:
    token = name.removesuffix(".data").removeprefix(f"{stem}.")
    return name == f"{stem}.{token}.data" and len(token) == 8 and set(token) <= set("0123456789abcdef")
