"""Exported models by their file alone."""

from __future__ import annotations

from pathlib import Path

from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.runner import Runner


def open_runner(path: str | Path) -> Runner:
    """An ``.onnx`` or ``.ort`` file in ONNX Runtime, any other file as a TensorRT engine; a folder by what it holds.

    Raises:
        ArtifactError: it is missing or damaged.
        BackendError: that runtime cannot run it here.
    """
    file = next(iter(ScheduleVariants.load(path).files.values())) if Path(path).is_dir() else Path(path)
    if file.suffix in (".onnx", ".ort"):
        from lazy_compile.backends.onnxruntime.runner import OnnxRunner

        return OnnxRunner(path)
    from lazy_compile.backends.tensorrt.runner import TensorRTRunner

    return TensorRTRunner(path)
