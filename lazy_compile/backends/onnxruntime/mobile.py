"""The format of ONNX Runtime's builds for phones: an exported model, optimized for no machine in particular."""

from __future__ import annotations

from pathlib import Path

from lazy_compile.backends.onnx.metadata import KEY, OnnxMetadata, first_line
from lazy_compile.backends.onnx.prologue import find_prologue, prologue_path, waiting_path
from lazy_compile.backends.onnx.save import put_in_place
from lazy_compile.backends.onnx.sealed_file import check_file, properties_of, read_proto, seal_opaque
from lazy_compile.backends.onnxruntime.runner import open_session
from lazy_compile.errors import BackendError, import_optional
from lazy_compile.storage import atomic_path, locked_folder, superseding


def convert_to_ort(onnx: str | Path, path: str | Path) -> int:
    """Write an exported model as an ``.ort`` file, its prologue beside it if it has one; returns their size in bytes.

    Its conditionals, names and description are those of the ONNX file, so that :class:`OnnxRunner` runs it too. What it
    is optimized by holds on every CPU.

    Raises:
        BackendError: ONNX Runtime cannot convert it.
        ArtifactError: the file cannot be written, or the prologue of the model is missing.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    onnx, path = Path(onnx), Path(path)
    properties = properties_of(read_proto(onnx))
    metadata = OnnxMetadata.parse(properties) if KEY in properties else None
    if metadata is None or (prologue := find_prologue(onnx, metadata)) is None:
        _convert(onnx, path)
        return path.stat().st_size
    beside = prologue_path(path, metadata.gating)
    waiting = waiting_path(path, metadata.gating, metadata.prologue)
    with locked_folder(path.parent), superseding(beside, (), [waiting.name]):
        _convert(prologue, waiting)
        _convert(onnx, path)
        put_in_place(waiting, beside)
    return path.stat().st_size + beside.stat().st_size


def _convert(onnx: Path, path: Path) -> None:
    """Write one file."""
    ort = import_optional("onnxruntime", "onnx")
    check_file(onnx)
    with atomic_path(path) as temporary:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(temporary)
        options.add_session_config_entry("session.save_model_format", "ORT")
        try:
            open_session(onnx, options, ["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime cannot convert {onnx} ({first_line(error)}); export with --target onnx and run that"
            ) from error
        seal_opaque(temporary)
