"""NVIDIA ModelOpt: the mode ``lazy_compile``, and quantisers that graphs and engines keep whole.

>>> import lazy_compile.integrations.modelopt                              # doctest: +SKIP
>>> model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop)        # doctest: +SKIP
>>> lazy = mto.apply_mode(model, [("lazy_compile", {"reuse": "linear"})])  # doctest: +SKIP
>>> mto.save(lazy, "lazy.pth")                                             # doctest: +SKIP

``mtq.quantize(lazy, ...)`` after ``apply_mode`` works too: while quantisers collect their ranges, the original runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import create_model
from torch import Tensor, nn

from lazy_compile.config import LazyConfig
from lazy_compile.errors import import_optional
from lazy_compile.ir.fake_quantize import fake_quantize
from lazy_compile.runtime.artifact import read
from lazy_compile.runtime.lazy_graph import LazyGraph
from lazy_compile.runtime.module import LazyModule

import_optional("modelopt.torch.opt", "modelopt")

from modelopt.torch.opt.config import ModeloptBaseConfig  # noqa: E402
from modelopt.torch.opt.conversion import ModeloptStateManager  # noqa: E402
from modelopt.torch.opt.mode import ModeDescriptor, _ModeRegistryCls  # noqa: E402
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend  # noqa: E402

MODE = "lazy_compile"
"""The name of the mode, and of the backend that its quantisers run on."""

_STATE = (ModeloptStateManager._state_key, ModeloptStateManager._state_version_key)
_OPTIONS: dict[str, Any] = {
    item.name: (get_type_hints(LazyConfig)[item.name], item.default) for item in fields(LazyConfig)
}

LazyModeConfig = create_model("LazyModeConfig", __base__=ModeloptBaseConfig, **_OPTIONS)


class ModelOptLazyModule(LazyModule):
    """A lazy model that carries ModelOpt's record of what was done to it; ``lazy_compile.restore`` hands it back."""

    def release(self) -> nn.Module:
        _move_record(self, self.original)
        return super().release()

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {key: self.__dict__[key] for key in _STATE}

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if any(quantizer._if_calib for quantizer in _quantizers(self.original)):
            self.reset()
            return self.original(*args, **kwargs)
        return super()._call(*args, **kwargs)

    def _graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LazyGraph, list[Tensor]]:
        for quantizer in _quantizers(self.original):
            if _is_static(quantizer):
                quantizer.backend = MODE
        return super()._graph_for(args, kwargs)


def _quantizers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, TensorQuantizer))


def _is_static(quantizer: Any) -> bool:
    """Of 8 bits with ranges that were measured; block, dynamic and biased ones stay with ModelOpt's own code."""
    return (
        quantizer.is_enabled
        and quantizer.fake_quant
        and quantizer.backend is None
        and hasattr(quantizer, "_amax")
        and quantizer.block_sizes is None
        and quantizer.bias_calibrator is None
        and not (quantizer._dynamic or quantizer._unsigned)
        and quantizer.num_bits in (8, (4, 3))
    )


def _fake_quantize(inputs: Tensor, quantizer: Any) -> Tensor:
    highest = 127 if quantizer.num_bits == 8 else 0
    lowest = -highest if quantizer._narrow_range or not highest else -128
    result: Tensor = fake_quantize(inputs, quantizer._get_amax(inputs), lowest, highest)
    return result


register_quant_backend(MODE, _fake_quantize)


def _move_record(source: nn.Module, target: nn.Module) -> None:
    """ModelOpt wants its record on the outermost module, and nowhere else."""
    for key in _STATE:
        target.__dict__[key] = source.__dict__.pop(key)


def _convert(model: nn.Module, config: Any) -> tuple[LazyModule, dict[str, Any]]:
    chosen = LazyConfig.from_dict(config.model_dump())
    lazy = ModelOptLazyModule(model, chosen)
    _move_record(model, lazy)
    return lazy, {}


def _restore(model: nn.Module, config: Any, metadata: dict[str, Any]) -> nn.Module:
    lazy, _ = _convert(model, config)
    if metadata:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in metadata.items():
                (Path(folder) / name).write_bytes(content.numpy().tobytes())
            lazy.policy = read(folder).policy
    return lazy


def _note_policy(model: nn.Module, config: Any, metadata: dict[str, Any]) -> None:
    """The files that :meth:`LazyModule.save` writes, as tensors: what a checkpoint of ModelOpt may hold."""
    metadata.clear()
    if isinstance(model, LazyModule) and model.is_captured:
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            for file in Path(folder).iterdir():
                metadata[file.name] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)


@_ModeRegistryCls(MODE).register_mode
class LazyMode(ModeDescriptor):  # type: ignore[misc]
    """Gate and cache the branches of a diffusion transformer. Its options are those of :class:`LazyConfig`."""

    name = MODE
    config_class = LazyModeConfig
    convert = staticmethod(_convert)
    restore = staticmethod(_restore)
    update_for_save = staticmethod(_note_policy)
