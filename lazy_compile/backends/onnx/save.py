"""Writing exported models: checked first, complete or absent, with large weights in a file of their own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lazy_compile.backends.onnx.metadata import first_line
from lazy_compile.errors import BackendError, import_optional
from lazy_compile.storage import atomic_path

if TYPE_CHECKING:
    from onnx_ir import Model

OPSETS = range(18, 23)
"""From 23 on the exporter keeps ``Attention`` whole, which TensorRT does not build inside an ``If``."""

EXTERNAL_BYTES = 2_000_000_000
"""Weights above this go to a file of their own: a protobuf message ends at 2 GiB."""


def save_model(model: Model, path: Path) -> int:
    """Write and check a model; the size of its files in bytes."""
    with written_model(model, path) as size:
        return size


@contextmanager
def written_model(model: Model, path: Path) -> Iterator[int]:
    """Write and check a temporary file, and give it its name when the block ends well. The weights' name is new each
    time, so an older model and its weights stay together until then."""
    ir, onnx = import_optional("onnx_ir", "onnx"), import_optional("onnx", "onnx")
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    external = sum(tensor.nbytes for tensor in weights if not isinstance(tensor, ir.ExternalTensor)) > EXTERNAL_BYTES
    data = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.data")
    try:
        with atomic_path(path) as temporary:
            ir.save(model, temporary, external_data=data.name if external else None)
            onnx.checker.check_model(str(temporary), full_check=True)
            yield temporary.stat().st_size + (data.stat().st_size if external else 0)
    except BaseException as error:
        data.unlink(missing_ok=True)
        if isinstance(error, onnx.checker.ValidationError | onnx.shape_inference.InferenceError):
            raise BackendError(
                f"the exported model is not valid ONNX: {first_line(error)}; try opset={OPSETS[-1]} (bfloat16 needs "
                "it), or another dtype"
            ) from error
        raise
    for older in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 8}.data"):
        if older != data:
            older.unlink(missing_ok=True)
