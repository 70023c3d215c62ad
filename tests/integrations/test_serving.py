"""Adapters for serving engines, called as their sources call them; and continuous batching."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazy_compile import AlwaysCompute, LazyModule
from lazy_compile.errors import ConfigError
from lazy_compile.integrations import serving
from lazy_compile.integrations.serving import LazyCacheAccelerator, LazyCacheBackend
from support.small_model import SMALL
from support.toy_server import Request, serve


class Pipeline:
    """What an engine holds: a transformer and a loop over steps."""

    def __init__(self) -> None:
        self.transformer: Any = SMALL.model()

    def __call__(self, *names: str) -> Tensor:
        return torch.cat(serve(self.transformer, [Request(name) for name in names]))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline()


# Engines --------------------------------------------------------------------------------------------------------------


def test_vllm_omni(pipeline: Pipeline) -> None:
    dense, transformer = pipeline("a", "b"), pipeline.transformer
    backend = LazyCacheBackend(SimpleNamespace(rel_l1_thresh=0.2), policy=AlwaysCompute())
    assert not backend.is_enabled()
    backend.enable(pipeline)
    assert backend.is_enabled()
    backend.refresh(pipeline, 6)
    assert torch.equal(pipeline("a", "b"), dense)
    backend.denoisers.lazy["transformer"].policy = "balanced"
    backend.refresh(pipeline, 6, verbose=False)
    assert not torch.equal(pipeline("a", "b"), dense)
    assert backend.denoisers.stats()["transformer"]["lazy_ratio"] == pytest.approx(1 / 6)
    backend.refresh(pipeline, 6)
    assert backend.denoisers.lazy["transformer"].cache_bytes == 0
    backend.disable()
    assert not backend.is_enabled()
    assert pipeline.transformer is transformer
    assert torch.equal(pipeline("a", "b"), dense)


def test_vllm_omni_by_name() -> None:
    selector = ModuleType("selector")
    selector.get_cache_backend = lambda name, config: (name, config)  # type: ignore[attr-defined]
    serving.install(selector, policy="fast")
    assert selector.get_cache_backend("tea_cache", 1) == ("tea_cache", 1)
    backend = selector.get_cache_backend("lazy_compile", {"rel_l1_thresh": 0.2})
    assert isinstance(backend, LazyCacheBackend)
    assert backend.denoisers.policy == "fast"
    with pytest.raises(ConfigError, match="has no get_cache_backend"):
        serving.install(ModuleType("other"))


def test_tensorrt_llm(pipeline: Pipeline) -> None:
    dense = pipeline("a")
    accelerator = LazyCacheAccelerator(pipeline, policy="balanced")
    assert accelerator.get_stats() == {}
    accelerator.wrap()
    accelerator.wrap()  # it is wrapped already
    accelerator.refresh(6)
    assert not torch.equal(pipeline("a"), dense)
    assert accelerator.get_stats()["transformer"]["lazy_ratio"] == pytest.approx(1 / 6)
    accelerator.unwrap()
    assert not accelerator.is_enabled()
    assert torch.equal(pipeline("a"), dense)


def test_sglang(pipeline: Pipeline) -> None:
    dense, transformer = pipeline("a"), pipeline.transformer
    assert serving.enable_cache_on_transformer(transformer, policy="balanced", reuse="last") is transformer
    assert not torch.equal(pipeline("a"), dense)
    assert transformer.lazy.stats.lazy_ratio == pytest.approx(1 / 6)
    serving.refresh_context_on_transformer(transformer, num_inference_steps=6)
    assert transformer.lazy.cache_bytes == 0
    assert serving.disable_cache_on_transformer(transformer) is transformer
    assert torch.equal(pipeline("a"), dense)


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(ConfigError, match="has none of transformer, transformer_2, unet"):
        LazyCacheBackend().enable(SimpleNamespace(vae=nn.Linear(1, 1)))


# Continuous batching --------------------------------------------------------------------------------------------------


def requests() -> list[Request]:
    """They come while others run, and take different numbers of steps."""
    return [Request("a"), Request("b", steps=9), Request("c", arrives=2), Request("d", arrives=3), Request("e", 7, 12)]


@pytest.fixture
def lazy(shared: LazyModule) -> LazyModule:
    shared.policy = "balanced"
    return shared


@pytest.mark.parametrize("told", [True, False], ids=["the server says which row is whose", "rows are recognised"])
def test_rows_that_come_and_go_are_what_they_are_alone(lazy: LazyModule, told: bool) -> None:
    alone = [sample for request in requests() for sample in serve(lazy, [request])]
    reused = lazy.stats.reused.sum()
    lazy.reset()
    lazy.reset_stats()
    together = serve(lazy, requests(), told=lazy.trajectory if told else None)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(together, alone, strict=True))
    assert lazy.stats.reused.sum() == reused > 0
    assert lazy.stats.calls < sum(request.steps for request in requests())  # in batches of several steps
    assert lazy.cache_bytes == 0 or not told  # requests that are over leave nothing behind


def test_with_nothing_reused_it_is_the_dense_server(lazy: LazyModule) -> None:
    lazy.policy = AlwaysCompute()
    dense = serve(lazy.original, requests())
    assert all(map(torch.equal, serve(lazy, requests(), told=lazy.trajectory), dense))
