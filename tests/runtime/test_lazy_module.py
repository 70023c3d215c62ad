"""The lazy model as a user meets it: a drop-in for the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import LazyModule
from support.layers import WIDTH, SwiGLU, norm
from support.small_model import ALWAYS, NEVER, SMALL, Small, Wraps, fresh, run, same
from support.toy_models import TOYS, call, randomize, trajectory

Compiled = Callable[..., LazyModule]


# The original is left alone, and followed -----------------------------------------------------------------------------


def test_the_original_is_not_modified() -> None:
    model = SMALL.model().train()
    model.attn.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: (id(module), dict(vars(module))) for name, module in model.named_modules()}
    lazy = lazy_compile.transform(model, call(SMALL))
    lazy.policy = NEVER
    run(lazy, trajectory(SMALL, steps=3))
    assert {name: (id(module), dict(vars(module))) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.attn.training
    assert lazy_compile.restore(lazy) is model


def test_parameters_are_shared() -> None:
    lazy = fresh()
    assert {id(parameter) for parameter in lazy.parameters()} == {id(p) for p in lazy.original.parameters()}


def test_a_weight_that_changes_in_place_takes_effect_at_once() -> None:
    lazy = fresh()
    before = run(lazy, [call(SMALL)])
    with torch.no_grad():
        lazy.original.mlp.up.weight.mul_(2)
    after = run(lazy, [call(SMALL)])
    assert not same(before, after)
    assert same(after, run(lazy.original, [call(SMALL)]))


def test_a_parameter_that_is_assigned_takes_effect_at_once() -> None:
    lazy = fresh()
    model = lazy.original
    model.mlp.up.weight = nn.Parameter(2 * model.mlp.up.weight.detach())
    assert same(run(lazy, [call(SMALL)]), run(model, [call(SMALL)]))
    assert lazy.stats.captures == 1


def replace_a_module(model: nn.Module) -> None:
    model.mlp = randomize(SwiGLU(), seed=9)


def change_an_attribute(model: nn.Module) -> None:
    model.scale = 2.0


def add_a_hook(model: nn.Module) -> None:
    model.attn.register_forward_hook(lambda module, inputs, output: 2 * output)


def replace_a_plain_tensor(model: nn.Module) -> None:
    model.table = torch.ones(WIDTH)


class Changing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.table = 1.0, torch.zeros(WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks(self.enter(x, t) + self.table) * self.scale


def test_another_change_takes_effect_at_the_next_trajectory() -> None:
    model = randomize(Changing()).eval()
    lazy = lazy_compile.transform(model)
    before = run(lazy, [call(SMALL, step=1)])
    for change in (replace_a_module, change_an_attribute, add_a_hook, replace_a_plain_tensor):
        change(model)
        lazy.reset()
        after = run(lazy, [call(SMALL, step=1)])
        assert same(after, run(model, [call(SMALL, step=1)])), change.__name__
        assert not same(after, before), change.__name__
        before = after


def test_a_change_is_not_forgotten_while_another_kind_of_call_is_captured() -> None:
    lazy = fresh()
    replace_a_module(lazy.original)
    arguments = call(SMALL)
    run(lazy, [{**arguments, "t": arguments["t"].double()}])
    lazy.reset()
    assert same(run(lazy, [arguments]), run(lazy.original, [arguments]))


# A module among modules -----------------------------------------------------------------------------------------------


def test_a_deep_copy_shares_nothing(shared: LazyModule) -> None:
    shared.policy = ALWAYS
    twin = copy.deepcopy(shared)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert same(run(shared, [call(SMALL)]), run(SMALL.model(), [call(SMALL)]))
    assert not same(run(twin, [call(SMALL)]), run(shared, [call(SMALL)]))
    assert twin.lazy_config == shared.lazy_config
    assert twin.cache_bytes > 0
    assert twin.original is not shared.original


def test_a_state_dict_has_the_names_of_the_original(shared: LazyModule) -> None:
    state = shared.state_dict()
    assert list(state) == list(shared.original.state_dict())
    other = lazy_compile.transform(Small().eval())
    other.load_state_dict(state)
    assert same(run(other.original, [call(SMALL)]), run(shared.original, [call(SMALL)]))


def test_a_lazy_model_is_saved_and_loaded_as_a_part_of_another(shared: LazyModule) -> None:
    whole, other = (nn.ModuleDict({"denoiser": model}) for model in (shared, lazy_compile.transform(Small())))
    state = whole.state_dict()
    assert list(state) == [f"denoiser.{name}" for name in shared.original.state_dict()]
    other.load_state_dict(state)
    assert torch.equal(other["denoiser"].original.attn.q.weight, shared.original.attn.q.weight)
    assert list(state) == [f"denoiser.{name}" for name in shared.original.state_dict()]
    plain = nn.ModuleDict({"denoiser": Small()})
    plain.load_state_dict(state)
    del state["denoiser.attn.q.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "denoiser\.original\.attn\.q\.bias"'):
        other.load_state_dict(state)


def test_other_attributes_are_those_of_the_original(shared: LazyModule) -> None:
    shared.original.config = {"sample_size": 8}  # a pipeline reads it
    try:
        assert shared.config == {"sample_size": 8}
        assert shared.attn is shared.original.attn
        with pytest.raises(AttributeError, match="'Small' object has no attribute 'nothing'"):
            _ = shared.nothing
    finally:
        del shared.original.config


class ShowsFeatures(Wraps):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.small.enter(x, t)
        features = self.small.attn(norm(h))
        h = h + features
        h = h + self.small.mlp(norm(h))
        return h, features, features.transpose(1, 2)


def test_a_caller_may_write_to_what_he_receives() -> None:
    lazy = lazy_compile.transform(randomize(ShowsFeatures()).eval(), call(SMALL), reuse="last")
    lazy.policy = NEVER
    calls = trajectory(SMALL, steps=4)
    kept = [tuple(tensor.clone() for tensor in outputs) for outputs in run(lazy, calls)]
    lazy.reset()
    with torch.no_grad():
        for arguments, expected in zip(calls, kept, strict=True):
            outputs = lazy(**arguments)
            assert same(outputs, expected)
            for tensor in outputs:
                tensor.zero_()


def test_a_driver_answers_every_call_and_leaves_no_trace(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    seen = []

    def drive(model_call: Any) -> str:
        seen.append((model_call.step, model_call.timestep))
        return "driven"

    run(lazy, calls[:2])
    with lazy.call_handler(drive):
        assert run(lazy, calls) == ["driven"] * 3
    assert seen == [(0, 999.0), (1, 666.0), (2, 333.0)]
    assert same(run(lazy, calls), run(lazy.original, calls))


class SizedByValues(nn.Module):
    """As large as its latents, which only the values of another input tell, as in a model that unpacks patches."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SwiGLU()

    def forward(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        h = x + t[:, None, None]
        h = h + self.mlp(norm(h))
        return h.reshape(h.shape[0], int(rows[0]), -1, WIDTH).flatten(1, 2)


def test_a_result_whose_size_depends_on_values_is_seen_to_continue_the_latents() -> None:
    model = randomize(SizedByValues())
    example = {"x": torch.randn(2, 16, WIDTH), "t": torch.rand(2), "rows": torch.tensor([4])}
    lazy = lazy_compile.transform(model, example)
    assert lazy.graph.captured.has_open_sizes
    assert lazy.graph.latents is not None
    assert (lazy.graph.latents.position, lazy.graph.latents.output) == (0, 0)
    lazy.policy = ALWAYS
    assert same(run(lazy, [example]), run(model, [example]))
