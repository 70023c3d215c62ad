"""``enable_cache`` of diffusers with a configuration of lazy_compile, and modular pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lazy_compile import LazyCacheConfig, LazyConfig, apply_lazy_cache
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.diffusers_enable_cache import CacheMixin
from support.diffusers_pipelines import Case, flux, sd3


@pytest.fixture(scope="module")
def case() -> Case:
    return flux()


@pytest.fixture(scope="module")
def dense(case: Case) -> Tensor:
    return case.sample()


@pytest.fixture(autouse=True)
def disabled(case: Case) -> Any:
    yield
    case.model.disable_cache()


def test_it_acts_at_once_and_says_what_it_does(case: Case, dense: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    transformer = case.model
    transformer.enable_cache(LazyCacheConfig(policy="balanced"))
    said = capsys.readouterr().err
    assert said == (
        "lazy_compile: FluxTransformer2DModel: the first 4 calls of a trajectory compute, then one call in 2; the "
        "others reuse all branches\n"
    )
    assert transformer.is_cache_enabled
    assert not torch.equal(case.sample(), dense)
    assert transformer.lazy.stats.lazy_ratio == pytest.approx(1 / 6)
    transformer.lazy.policy = "quality"
    assert torch.equal(case.sample(), dense)  # the first 8 calls of 6 compute
    transformer.disable_cache()
    assert case.model is transformer
    assert not transformer.is_cache_enabled
    assert not hasattr(transformer, "lazy")
    assert torch.equal(case.sample(), dense)


def test_a_plain_config_takes_the_default_preset(case: Case) -> None:
    case.model.enable_cache(LazyConfig(reuse="last"))
    assert case.model.lazy.lazy_config == LazyConfig(reuse="last")
    assert case.model.lazy.policy == apply_lazy_cache(torch.nn.Linear(1, 1), policy="balanced").policy


def test_caches_of_diffusers_go_on_as_before(case: Case, dense: Tensor) -> None:
    own = diffusers.FirstBlockCacheConfig(threshold=0.0)
    case.model.enable_cache(own)
    with pytest.raises(ConfigError, match="FirstBlockCacheConfig is enabled"):
        case.model.enable_cache(LazyCacheConfig())
    case.model.disable_cache()
    assert torch.equal(case.sample(), dense)
    case.model.enable_cache(LazyCacheConfig())
    with pytest.raises(ConfigError, match="this model is lazy"):
        case.model.enable_cache(own)


def test_a_wrong_configuration_is_still_refused_by_diffusers(case: Case) -> None:
    with pytest.raises(ValueError, match="not supported"):
        case.model.enable_cache("balanced")
    assert CacheMixin.enable_cache.__wrapped__.__doc__ == CacheMixin.enable_cache.__doc__


@pytest.mark.slow
def test_a_modular_pipeline() -> None:
    blocks = diffusers.StableDiffusion3AutoBlocks()
    for part in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(part)
    given, pipe, size = sd3(), blocks.init_pipeline(), {"height": 64, "width": 64}
    pipe.update_components(transformer=given.model, scheduler=given.pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**{**given.arguments, **size}, num_inference_steps=6, generator=generator, output="latents")

    expected = sample()
    lazy = apply_lazy_cache(pipe.transformer)
    assert torch.equal(sample(), expected)
    lazy.policy = "balanced"
    assert not torch.equal(sample(), expected)
    assert lazy.stats.lazy_ratio == pytest.approx(1 / 6)
    pipe.transformer.disable_lazy_cache()
    assert torch.equal(sample(), expected)
