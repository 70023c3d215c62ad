"""Integer weights of torchao, run by ``make test-torchao``: where it is installed, diffusers tells of load errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from support.small_model import SMALL, Small, run, same
from support.toy_models import TOYS, call, randomize, trajectory

pytestmark = pytest.mark.torchao

STEPS = 6
WEIGHTS, ACTIVATIONS_TOO = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"


def quantized(model: nn.Module, recipe: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, recipe)())
    return model


@pytest.mark.parametrize("recipe", [WEIGHTS, ACTIVATIONS_TOO])
@pytest.mark.parametrize("toy", ["dit", "mmdit"])
def test_a_quantized_model_is_followed_bitwise_and_reuses(toy: str, recipe: str) -> None:
    case = TOYS[toy]
    calls, plain = trajectory(case, steps=STEPS), run(case.model(), trajectory(case, steps=STEPS))
    model = quantized(case.model(), recipe)
    expected = run(model, calls)
    assert not same(expected, plain)
    lazy = lazy_compile.transform(model, calls[0])
    assert same(run(lazy, calls), expected)
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    assert all(torch.isfinite(output).all() for output in run(lazy, calls))
    assert lazy.stats.lazy_ratio == 0.5


def test_new_integer_weights_take_effect_without_a_capture() -> None:
    arguments: list[dict[str, Any]] = [call(SMALL)]
    model = quantized(randomize(Small()).eval(), WEIGHTS)
    lazy = lazy_compile.transform(model, arguments[0])
    names = [item.name for item in lazy.graph.program.inputs]
    assert "mlp.up.parametrizations.weight.original0" in names
    other = quantized(randomize(Small(), 5).eval(), WEIGHTS)
    model.mlp.up.weight = nn.Parameter(other.mlp.up.weight.detach(), requires_grad=False)
    lazy.reset()
    assert same(run(lazy, arguments), run(model, arguments))
    assert lazy.stats.captures == 1
