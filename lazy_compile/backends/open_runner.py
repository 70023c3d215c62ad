"""Exported models by their file alone."""

from __future__ import annotations

from pathlib import Path

from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.runner import Runner
from lazy_compile.digests import verification


def open_runner(path: str | Path, *, verify: bool = True) -> Runner:
    """An ``.onnx`` or ``.ort`` file in ONNX Runtime, any other file as a TensorRT engine; a folder by what it holds.

    Args:
        path: the file or folder.
        verify: False reads it without holding it against its digests.

    Raises:
        ArtifactError: it is missing or damaged.
        BackendError: that runtime cannot run it here.
    """
    with verification(verify):
        return _open(path)


def _open(path: str | Path) -> Runner:
    file = next(iter(ScheduleVariants.load(path).files.values())) if Path(path).is_dir() else Path(path)
    if file.suffix in (".onnx", ".ort"):
        from lazy_compile.backends.onnxruntime.runner import OnnxRunner

        return OnnxRunner(path)
    from lazy_compile.backends.tensorrt.runner import TensorRTRunner

    return TensorRTRunner(path)
