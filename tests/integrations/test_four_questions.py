"""Every host is asked the same four questions, see :mod:`support.four_questions`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import LazyCacheConfig, LazyModule
from lazy_compile.integrations import dynamo
from lazy_compile.integrations.engine_module import EngineModule
from support.diffusers_pipelines import image_vae, normal, random_weights
from support.four_questions import Denoiser, Hosted, answer
from support.layers import TOKENS, WIDTH
from support.small_model import SMALL
from support.toy_models import call

pytestmark = pytest.mark.filterwarnings("ignore")


def small(model: Any) -> Denoiser:
    return lambda x, t: model(x=x, t=t)


def in_place_of(model: nn.Module, lazy: LazyModule) -> Hosted:
    return Hosted(small(model), small(lazy), lazy, lambda: small(lazy_compile.restore(lazy)), len(lazy.branches))


def of_a_pipeline(_: Path) -> Hosted:
    pipe = flux_pipeline()
    dense = flux(pipe.transformer)
    lazy_compile.transform(pipe)
    lazy = pipe.transformer
    flux(lazy)(torch.zeros(2, TOKENS, WIDTH), torch.ones(2))
    return Hosted(dense, flux(lazy), lazy, lambda: flux(lazy_compile.restore(pipe).transformer), len(lazy.branches))


def by_enable_cache(_: Path) -> Hosted:
    model, plain = flux_model(), flux_model()
    model.enable_cache(LazyCacheConfig())
    flux(model)(torch.zeros(2, TOKENS, WIDTH), torch.ones(2))

    def disable() -> Denoiser:
        model.disable_cache()
        return flux(model)

    return Hosted(flux(plain), flux(model), model.lazy, disable, len(model.lazy.branches))


def by_torch_compile(_: Path) -> Hosted:
    torch.compiler.reset()
    model = SMALL.model()
    compiled = torch.compile(model, backend="lazy_compile")
    with torch.no_grad():
        compiled(**call(SMALL))
    lazy = dynamo.lazy_modules()[-1]

    def reset() -> Denoiser:
        torch.compiler.reset()
        return small(model)

    return Hosted(small(model), small(compiled), lazy, reset, len(lazy.branches))


def compiled_in_parts(_: Path) -> Hosted:
    model = SMALL.model()
    lazy = lazy_compile.transform(model, call(SMALL))
    lazy.compile(backend="eager")
    return in_place_of(model, lazy)


def with_lora(_: Path) -> Hosted:
    model = SMALL.model()
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q", "up"], init_lora_weights=False), model)
    return in_place_of(model, lazy_compile.transform(model, call(SMALL)))


def offloaded_by_accelerate(_: Path) -> Hosted:
    model = accelerate.cpu_offload(SMALL.model(), torch.device("cpu"))
    return in_place_of(model, lazy_compile.transform(model, call(SMALL)))


def quantised_by_modelopt(_: Path) -> Hosted:
    mtq = importlib.import_module("modelopt.torch.quantization")
    mto = importlib.import_module("modelopt.torch.opt")
    importlib.import_module("lazy_compile.integrations.modelopt")  # registers the mode
    model = mtq.quantize(SMALL.model(), mtq.INT8_DEFAULT_CFG, lambda model: model(**call(SMALL)))
    lazy = mto.apply_mode(model, [("lazy_compile", {})])
    lazy.capture(**call(SMALL))
    return in_place_of(model, lazy)


def quantised_by_torchao(_: Path) -> Hosted:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = importlib.import_module("torchao.quantization")
        model = SMALL.model()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return in_place_of(model, lazy_compile.transform(model, call(SMALL)))


def in_onnx_runtime(folder: Path) -> Hosted:
    return exported(folder, lambda path: path)


def in_openvino(folder: Path) -> Hosted:
    runner = importlib.import_module("lazy_compile.backends.openvino.runner")
    return exported(folder, lambda path: runner.OpenVinoRunner(path, threads=1))


def exported(folder: Path, opened: Callable[[Path], Any]) -> Hosted:
    model = SMALL.model()
    lazy = lazy_compile.transform(model, call(SMALL))
    lazy_compile.export_onnx(lazy, folder / "m.onnx", gating="input", dynamic=False)
    engine = EngineModule(opened(folder / "m.onnx"), like=model)
    return Hosted(small(model), small(engine), engine, lambda: small(model), len(lazy.branches), error=1e-4)


def flux_model() -> Any:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=WIDTH, num_layers=1, num_single_layers=0, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return random_weights(model)


def flux_pipeline() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, image_vae(), *[None] * 4, flux_model())


def flux(model: Any) -> Denoiser:
    text = {"encoder_hidden_states": normal(2, 5, 12), "pooled_projections": normal(2, 10)}
    places = {"img_ids": torch.arange(TOKENS).float()[:, None].expand(-1, 3), "txt_ids": torch.zeros(5, 3)}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = model(hidden_states=x, timestep=t / 1000, **text, **places, return_dict=False)[0]
        return result

    return denoise


HOSTS = [
    *[by_enable_cache, by_torch_compile, compiled_in_parts, with_lora, offloaded_by_accelerate, quantised_by_modelopt],
    *[pytest.param(host, marks=pytest.mark.slow) for host in (of_a_pipeline, in_onnx_runtime)],
    pytest.param(quantised_by_torchao, marks=pytest.mark.torchao),
    pytest.param(in_openvino, marks=pytest.mark.openvino),
]


@pytest.mark.parametrize("host", HOSTS)
def test_it_is_exact_and_lazy_keeps_requests_apart_and_is_given_back(
    host: Callable[[Path], Hosted], tmp_path: Path
) -> None:
    answer(host(tmp_path))
