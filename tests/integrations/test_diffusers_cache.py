"""A model made lazy in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lazy_compile import CacheSchedule, LazyConfig, Scheduled, apply_lazy_cache
from lazy_compile.errors import ConfigError
from support.diffusers_pipelines import dit, wan
from support.toy_models import TOYS, randomize, trajectory

STEPS = 6
DIT = TOYS["dit"]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def model() -> nn.Module:
    return randomize(DIT.build()).eval()


@torch.no_grad()
def test_the_same_object_turns_lazy_and_back(model: nn.Module) -> None:
    calls = trajectory(DIT, steps=STEPS)
    dense = [model(**call) for call in calls]
    names = list(model.state_dict())
    lazy = apply_lazy_cache(model, LazyConfig(reuse="last"))
    assert model.lazy is lazy
    assert all(torch.equal(model(**call), expected) for call, expected in zip(calls, dense, strict=True))
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    reused = [model(**call) for call in calls]
    assert not torch.equal(reused[-1], dense[-1])
    assert model.lazy.stats.lazy_ratio == 0.5
    assert list(model.state_dict()) == names
    model.disable_lazy_cache()
    assert torch.equal(model(**calls[-1]), dense[-1])
    assert not hasattr(model, "lazy")


@torch.no_grad()
def test_weights_and_copies_are_followed(model: nn.Module) -> None:
    call = trajectory(DIT, steps=1)[0]
    apply_lazy_cache(model)
    model(**call)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert model(**call).abs().max() == 0
    assert copied(**call).abs().max() > 0


def test_twice_is_refused(model: nn.Module) -> None:
    apply_lazy_cache(model)
    with pytest.raises(ConfigError, match="lazy already"):
        apply_lazy_cache(model)


@pytest.mark.parametrize("make", [dit, wan])
def test_a_pipeline_keeps_its_transformer(make: object) -> None:
    case = make()  # type: ignore[operator]
    dense = case.sample()
    transformer = case.pipe.transformer
    lazy = apply_lazy_cache(transformer)
    assert case.pipe.transformer is transformer
    assert torch.equal(case.sample(), dense)
    lazy.policy = Scheduled(CacheSchedule.every(2, 20, len(lazy.branches)))
    case.sample()
    assert lazy.stats.lazy_ratio > 0.3
    transformer.disable_lazy_cache()
    assert torch.equal(case.sample(), dense)
