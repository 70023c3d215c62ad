"""Two passes for Microsoft Olive: a PyTorch model to ONNX with one ``If`` a gate, and that file after quantisation.

from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.quantization import OnnxDynamicQuantization
lazy = create_pass_from_dict(LazyCompile, {"policy": "balanced"}, disable_search=True).run(model, "lazy")
config = {"extra_options": {"EnableSubgraph": True}}  # the arms of an If are subgraphs, and left out without it
small = create_pass_from_dict(OnnxDynamicQuantization, config, disable_search=True).run(lazy, "int8")
ready = create_pass_from_dict(LazyCompileSeal, {}, disable_search=True).run(small, "ready")
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler, PyTorchModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, ParamCategory, PassConfigParam
from olive.resource_path import LocalFolder

import lazy_compile
from lazy_compile.backends.onnx.accept_changes import accept_changes
from lazy_compile.errors import ArtifactError

QUANTISED = {"ConvInteger", "DequantizeLinear", "MatMulInteger", "MatMulNBits", "QLinearConv", "QLinearMatMul"}


class LazyCompile(Pass):
    """Captures a denoiser, puts a gate around each branch, and exports it."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "policy": PassConfigParam(
                type_=str, default_value="balanced", description="A preset: quality, balanced or fast."
            ),
            "gates": PassConfigParam(
                type_=str, default_value=None, category=ParamCategory.PATH,
                description="A folder that `lazy-compile plan` or `calibrate` wrote; goes before the preset.",
            ),
            "gating": PassConfigParam(
                type_=str, default_value="input", description="Who decides: input (the host), predicate or schedule."
            ),
        }  # fmt: skip

    def _run_for_config(
        self, model: PyTorchModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        original, example = model.load_model().eval(), model.get_dummy_inputs()
        if config.gates:
            lazy = lazy_compile.load(config.gates, original)
            lazy.capture(**example) if isinstance(example, dict) else lazy.capture(*example)
        else:
            lazy = lazy_compile.transform(original, example, policy=config.policy)
        path = Path(resolve_onnx_path(output_model_path))
        path.parent.mkdir(parents=True, exist_ok=True)
        lazy_compile.export_onnx(lazy, path, gating=config.gating)
        return _handler(path)


class LazyCompileSeal(Pass):
    """After a pass that changed the file: all gates are there, what they skip is quantised, and runners read it."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        description = "Fail if nothing in the arms of the gates is quantised."
        return {"quantised": PassConfigParam(type_=bool, default_value=True, description=description)}

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        seen = Path(model.model_path)
        path = Path(resolve_onnx_path(output_model_path, seen.name))
        if Path(model.get_resource("model_path")).is_dir():
            shutil.copytree(seen.parent, path.parent, dirs_exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(seen, path)
        operators: dict[str, Any] = accept_changes(path)
        if config.quantised and not QUANTISED & operators.keys():
            raise ArtifactError(
                f"{seen} has no quantised operator in the arms of its gates; give the quantisation "
                'extra_options={"EnableSubgraph": True}, or this pass quantised=False'
            )
        return _handler(path)


def _handler(path: Path) -> ONNXModelHandler:
    return ONNXModelHandler(model_path=LocalFolder({"path": path.parent}), onnx_file_name=path.name)
