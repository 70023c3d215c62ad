"""Exported models in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.metadata import OnnxMetadata, first_line
from lazy_compile.backends.onnx.prologue import PROLOGUE_KEY, check_prologue, find_prologue
from lazy_compile.backends.onnx.seal import check_file
from lazy_compile.backends.runner import Runner
from lazy_compile.backends.session import TensorSpec
from lazy_compile.digests import RangeDigests, verification
from lazy_compile.errors import ArtifactError, BackendError, import_optional
from lazy_compile.policies.policy import Scheduled


class OnnxRunner(Runner):
    """A model that ``export_onnx`` wrote, or a folder of them, in ONNX Runtime; with its prologue, if it has one.

    Args:
        path: the file, or the folder.
        providers: see ``onnxruntime.InferenceSession``.
        threads: of one operator; None leaves it to ONNX Runtime.
        verify: False reads the files without holding them against their digests.

    Raises:
        ArtifactError: there is no such file, it is damaged, or export_onnx did not write it; or its prologue is missing
            or that of another model.
        BackendError: ONNX Runtime has no kernel for one of its operators.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        verify: bool = True,
    ) -> None:
        with verification(verify):
            masks = ScheduleVariants.load(path) if Path(path).is_dir() else None
            sessions, prologue = _load(Path(path), providers, threads)
        super().__init__(sessions, prologue)
        if masks is not None and self.metadata.policy is None:  # of the last release: its manifest holds the schedule
            self.policy = Scheduled(masks.schedule)


def _load(
    path: Path, providers: Sequence[str], threads: int | None
) -> tuple[dict[tuple[bool, ...], OnnxSession], OnnxFile | None]:
    """The models of a file or a folder by the decisions that are fixed in them, and their prologue."""
    files = ScheduleVariants.load(path).files if path.is_dir() else {(): path}
    places = RangeDigests()
    sessions = {mask: OnnxSession(file, providers, threads, places) for mask, file in files.items()}
    prologue: OnnxFile | None = None
    for mask, file in files.items():
        metadata = sessions[mask].metadata
        if metadata.should_compute != mask and path.is_dir():
            raise ArtifactError(f"{file} is not the model of its row of the schedule; export again")
        beside = find_prologue(file, metadata)
        if beside is not None:
            prologue = prologue or OnnxFile(beside, providers, threads, places)
            check_prologue(beside, prologue.properties.get(PROLOGUE_KEY, ""), file, metadata)
    return sessions, prologue


class OnnxFile:
    """One loaded file; see :class:`~lazy_compile.backends.session.LoadedFile`."""

    def __init__(
        self, path: Path, providers: Sequence[str], threads: int | None, places: RangeDigests | None = None
    ) -> None:
        ort = import_optional("onnxruntime", "onnx")
        if not path.is_file():
            raise ArtifactError(f"there is no file {path}; export_onnx writes one")
        check_file(path, places)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self.session = open_session(path, options, providers)
        except Exception as error:
            if type(error).__name__ == "NotImplemented":
                raise BackendError(f"ONNX Runtime has no kernel for {path}: {first_line(error)}") from error
            raise ArtifactError(f"cannot load {path} ({first_line(error)}); export the model again") from error
        self.properties: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
        on_cpu = self.session.get_providers()[0] == "CPUExecutionProvider"
        self.device = torch.device("cpu" if on_cpu else "cuda")
        self.inputs = _specs(self.session.get_inputs())
        self.outputs = _specs(self.session.get_outputs())

    def context(self) -> OnnxContext:
        return OnnxContext(self.session)


class OnnxSession(OnnxFile):
    """The model of a step; see :class:`~lazy_compile.backends.session.Session`."""

    def __init__(
        self, path: Path, providers: Sequence[str], threads: int | None, places: RangeDigests | None = None
    ) -> None:
        super().__init__(path, providers, threads, places)
        self.metadata = OnnxMetadata.parse(self.properties)


def open_session(path: str | Path, options: Any, providers: Sequence[str]) -> Any:
    """ONNX Runtime 1.32 looks for the scale of integer weights inside the arm of an ``If`` alone, and fails.

    Where it does, the session does without the optimizer that looks there.
    """
    ort = import_optional("onnxruntime", "onnx")
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        if "TransposeDQWeightsForMatMulNBits" not in str(error):
            raise
        return ort.InferenceSession(str(path), options, providers=list(providers), disabled_optimizers=[_FUSES_WEIGHTS])


_FUSES_WEIGHTS = "QDQSelectorActionTransformer"


class OnnxContext:
    """Calls with bound memory: nothing is copied. Views of buffers that come back are kept."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self._views = WeakIdKeyDictionary()

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        binding = self.session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, self._view(tensor))
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, self._view(tensor))
        binding.synchronize_inputs()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
        binding.synchronize_outputs()

    def _view(self, tensor: Tensor) -> Any:
        if tensor not in self._views:
            self._views[tensor] = import_optional("onnxruntime", "onnx").OrtValue.from_dlpack(tensor)
        return self._views[tensor]


def _specs(items: Sequence[Any]) -> dict[str, TensorSpec]:
    try:
        return {item.name: TensorSpec(tuple(item.shape), _DTYPES[item.type]) for item in items}
    except KeyError as error:
        raise ArtifactError(f"the model takes or returns {error}, which no export has; export it again") from error


_DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool, "tensor(uint8)": torch.uint8, "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
}  # fmt: skip
