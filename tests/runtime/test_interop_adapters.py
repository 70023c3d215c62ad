"""Models that adapters of peft have changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import nn

import lazy_compile
from lazy_compile import LazyModule
from support.small_model import SMALL, fresh, run, same
from support.toy_models import call

ARGUMENTS = [call(SMALL)]


def add_lora(model: nn.Module) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q", "up"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, model)


def adapted_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))


def follows(lazy: LazyModule) -> bool:
    """Whether the next trajectory is that of the original as it is now."""
    lazy.reset()
    return same(run(lazy, ARGUMENTS), run(lazy.original, ARGUMENTS))


def test_lora_before_the_transformation() -> None:
    model = SMALL.model()
    plain = run(model, ARGUMENTS)
    add_lora(model)
    lazy = lazy_compile.transform(model, call(SMALL))
    assert [branch.kind.value for branch in lazy.branches] == ["self_attention", "mlp"]
    assert follows(lazy)
    assert not same(run(lazy, ARGUMENTS), plain)


def test_lora_after_the_transformation_is_noticed_switched_and_merged() -> None:
    lazy = fresh()
    plain = run(lazy, ARGUMENTS)
    add_lora(lazy.original)
    assert follows(lazy)
    adapted = run(lazy, ARGUMENTS)
    assert not same(adapted, plain)
    for enabled, expected in ((False, plain), (True, adapted)):
        for layer in adapted_layers(lazy.original):
            layer.enable_adapters(enabled)
        assert follows(lazy)
        assert same(run(lazy, ARGUMENTS), expected)
    for layer in adapted_layers(lazy.original):
        layer.set_scale("default", 3.0)
    assert follows(lazy)
    scaled = run(lazy, ARGUMENTS)
    assert not same(scaled, adapted)
    for layer in adapted_layers(lazy.original):
        layer.merge()
    assert follows(lazy)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(run(lazy, ARGUMENTS), scaled, strict=True))


def test_lora_is_added_through_the_lazy_model_and_trained_in_it() -> None:
    lazy = fresh()
    add_lora(lazy)
    lazy.reset()
    lazy(**call(SMALL)).sum().backward()
    gradients = {name: parameter.grad is not None for name, parameter in lazy.original.named_parameters()}
    assert {name for name, there in gradients.items() if there} == {name for name in gradients if "lora_" in name}
    with torch.no_grad():
        for name, parameter in lazy.original.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    assert same(run(lazy, ARGUMENTS), run(lazy.original, ARGUMENTS))
