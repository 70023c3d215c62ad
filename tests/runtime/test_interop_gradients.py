"""Gradients flow where they flow in the original, and end where it ends them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lazy_compile
from support.layers import WIDTH, norm
from support.small_model import SMALL, Small, fresh
from support.toy_models import call, randomize


def no_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def switched(module: nn.Module, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    result = module(x)
    torch.set_grad_enabled(True)
    return result


def context_of_a_flag(module: nn.Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return module(x)


@torch.no_grad()
def decorated(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def nested(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = no_grad(module, x)
        return y + module(x) - y


def on_again_inside(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = module(x)
        with torch.enable_grad():
            return y * module(x)


class Recomputed(torch.autograd.Function):
    """Gradient checkpointing as research code has it (guided diffusion, latent diffusion)."""

    @staticmethod
    def forward(ctx, run, x, *weights):  # type: ignore[no-untyped-def, override]
        ctx.run, ctx.given = run, (x, *weights)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def, override]
        x, *weights = ctx.given
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.run(x)
        return None, *torch.autograd.grad(result, (x, *weights), gradient)


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    return Recomputed.apply(module, x, *module.parameters())  # type: ignore[no-any-return, no-untyped-call]


class Stops(Small):
    """Its attention is scaled by a value that is computed without gradients."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.scale = way, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.enter(x, t)
        scale = self.way(self.scale, h)
        h = h + self.attn(norm(h) * scale)
        return h + self.mlp(norm(h)), scale


def gradients(model: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    arguments = call(SMALL)
    results = [result for result in model(**arguments) if result.requires_grad]
    return list(torch.autograd.grad([result.sum() for result in results], parameters, allow_unused=True))


@pytest.mark.parametrize("way", [no_grad, switched, context_of_a_flag, decorated, nested, on_again_inside, recomputed])
def test_a_region_without_gradients_stays_one(way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = randomize(Stops(way)).eval()
    lazy = lazy_compile.transform(model, call(SMALL))
    parameters = list(model.parameters())
    assert [result.requires_grad for result in lazy(**call(SMALL))] == [
        result.requires_grad for result in model(**call(SMALL))
    ]
    for seen, expected in zip(gradients(lazy, parameters), gradients(model, parameters), strict=True):
        assert (seen is None) == (expected is None)
        assert seen is None or torch.allclose(seen, expected, rtol=1e-4, atol=1e-6)


class Checkpoints(Small):
    """Computes its MLP again in the backward pass, as ``gradient_checkpointing`` of diffusers does."""

    gradient_checkpointing = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x, t)
        h = h + self.attn(norm(h))
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return h + checkpoint(self.mlp, norm(h), use_reentrant=False)
        return h + self.mlp(norm(h))


def test_gradient_checkpointing_is_switched_on_and_off() -> None:
    model = randomize(Checkpoints()).eval()
    lazy = lazy_compile.transform(model, call(SMALL))
    for switch in (True, False):
        model.gradient_checkpointing = switch
        lazy.reset()
        seen, expected = lazy(**call(SMALL)), model(**call(SMALL))
        assert torch.equal(seen, expected)
        seen.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()


def test_requires_grad_is_that_of_the_original() -> None:
    lazy = fresh()
    lazy.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in lazy.original.parameters())
    assert not lazy(**call(SMALL)).requires_grad
    lazy.requires_grad_(True)
    assert lazy(**call(SMALL)).requires_grad


class Transposes(nn.Module):
    """An MLP whose weights lie the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(WIDTH, 2 * WIDTH)), nn.Parameter(torch.empty(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x * t[:, None, None]
        return h + torch.tanh(h @ self.up) @ self.down.T.T


def test_torch_counts_the_operations_of_a_model_that_transposes_its_weights() -> None:
    inputs = {"x": torch.randn(2, 16, WIDTH), "t": torch.ones(2)}
    lazy = lazy_compile.transform(randomize(Transposes()), inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lazy(**inputs)
    assert counter.get_total_flops() == 2 * lazy.graph.total_macs > 0
