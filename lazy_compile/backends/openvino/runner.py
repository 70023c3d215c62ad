"""Exported models in OpenVINO, which reads ONNX files as they are and runs only the chosen arm of an ``If``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazy_compile.backends.onnx.metadata import OnnxMetadata, first_line
from lazy_compile.backends.onnx.prologue import PROLOGUE_KEY, check_prologue, find_prologue
from lazy_compile.backends.onnx.seal import check_file
from lazy_compile.backends.runner import Runner
from lazy_compile.backends.session import TensorSpec
from lazy_compile.digests import verification
from lazy_compile.errors import ArtifactError, BackendError, import_optional


class OpenVinoRunner(Runner):
    """One file that ``export_onnx`` wrote, on a CPU with OpenVINO; with its prologue, if it has one.

    Args:
        path: the file.
        threads: of one inference; None leaves it to OpenVINO.
        options: of ``openvino.Core.compile_model``. Without ``INFERENCE_PRECISION_HINT`` float32 stays float32, where
            OpenVINO itself would take bfloat16 on machines that have it.
        verify: False reads the file without holding it against its digest.

    Raises:
        ArtifactError: there is no such file, it is damaged, or export_onnx did not write it.
        BackendError: OpenVINO cannot compile it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
        verify: bool = True,
    ) -> None:
        chosen: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", **(options or {})}
        if threads is not None:
            chosen["INFERENCE_NUM_THREADS"] = threads
        with verification(verify):
            session, prologue = OpenVinoSession(Path(path), chosen), None
            if (beside := find_prologue(Path(path), session.metadata)) is not None:
                prologue = OpenVinoFile(beside, chosen)
                check_prologue(beside, prologue.properties.get(PROLOGUE_KEY, ""), Path(path), session.metadata)
        super().__init__({(): session}, prologue)


class OpenVinoFile:
    """One compiled file; see :class:`~lazy_compile.backends.session.LoadedFile`."""

    device = torch.device("cpu")

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        onnx, openvino = import_optional("onnx", "onnx"), import_optional("openvino", "openvino")
        if not path.is_file():
            raise ArtifactError(f"there is no file {path}; export_onnx writes one, and OpenVINO runs single files")
        check_file(path)
        entries = onnx.load(path, load_external_data=False).metadata_props
        self.properties = {entry.key: entry.value for entry in entries}
        try:
            self.compiled = openvino.Core().compile_model(str(path), "CPU", dict(options))
        except Exception as error:
            raise BackendError(
                f"OpenVINO cannot compile {path}: {first_line(error)}; run it in ONNX Runtime"
            ) from error
        self.inputs = _specs(self.compiled.inputs)
        self.outputs = _specs(self.compiled.outputs)

    def context(self) -> OpenVinoContext:
        return OpenVinoContext(self.compiled)


class OpenVinoSession(OpenVinoFile):
    """The model of a step; see :class:`~lazy_compile.backends.session.Session`."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        super().__init__(path, options)
        self.metadata = OnnxMetadata.parse(self.properties)


class OpenVinoContext:
    """An inference request on the caller's own memory: nothing is copied."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._tensor = import_optional("openvino", "openvino").Tensor

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        try:
            for name, tensor in (*inputs.items(), *outputs.items()):
                self._request.set_tensor(name, self._tensor(tensor.contiguous().numpy(), shared_memory=True))
            self._request.infer()
        except Exception as error:
            raise BackendError(f"OpenVINO failed: {first_line(error)}") from error


def _specs(ports: list[Any]) -> dict[str, TensorSpec]:
    specs = {}
    for port in ports:
        dtype = _DTYPES.get(port.get_element_type().get_type_name())
        if dtype is None:
            raise BackendError(
                f"{port.any_name} is {port.get_element_type()}, which NumPy has not; "
                "export in fp32 or fp16 for OpenVINO"
            )
        for name in port.names:
            specs[name] = TensorSpec(tuple(port.shape), dtype)
    return specs


_DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "f64": torch.float64, "i64": torch.int64, "i32": torch.int32,
    "boolean": torch.bool,
}  # fmt: skip
