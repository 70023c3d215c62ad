"""What a lazy model refuses, in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, LazyConfig, LazyModule, Learned, Scheduled
from lazy_compile.errors import CaptureError, ConfigError, NoBranchError
from support.layers import TOKENS, WIDTH
from support.small_model import SMALL, Small
from support.toy_models import REFUSED, call

Compiled = Callable[..., LazyModule]


def message(error: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_argument_is_named_with_the_signature(shared: LazyModule) -> None:
    assert message(ConfigError, lambda: shared(torch.ones(2, TOKENS, WIDTH), timestep=torch.ones(2))) == (
        "Small.forward: missing a required argument: 't'; its signature is (x: 'Tensor', t: 'Tensor') -> 'Tensor'"
    )
    assert message(ConfigError, lambda: shared(**call(SMALL), guidance=3.0)) == (
        "Small.forward: got an unexpected keyword argument 'guidance'; its signature is "
        "(x: 'Tensor', t: 'Tensor') -> 'Tensor'"
    )


def test_a_policy_of_the_wrong_type_is_refused(shared: LazyModule) -> None:
    def assign() -> None:
        shared.policy = "always"

    assert message(ConfigError, assign) == (
        "policy is 'always'; expected one of 'quality', 'balanced', 'fast', a CacheSchedule, or a Policy such as "
        "Scheduled(schedule) or Learned(table)"
    )


def test_a_schedule_of_another_model_is_refused(shared: LazyModule) -> None:
    policy = Scheduled(CacheSchedule.every(2, 5, branches=3))

    def assign() -> None:
        shared.policy = policy

    expected = "the schedule has 3 branches, the model has 2; plan a schedule for this model"
    assert message(ConfigError, assign) == expected
    late = lazy_compile.transform(SMALL.model())
    late.policy = policy  # nothing is known of the model yet
    assert message(ConfigError, lambda: late(**call(SMALL))) == expected


def test_gates_of_another_model_are_refused(shared: LazyModule) -> None:
    table = GateTable((8, 8, 8), torch.zeros(1), torch.zeros(1, 24), torch.zeros(1, 3))

    def assign() -> None:
        shared.policy = Learned(table)

    assert message(ConfigError, assign) == (
        "the gate table is for 3 branches with 24 features, the model has 2 with 64; calibrate gates for this model"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resue": "last"}, "unknown option 'resue'; the options are batch_rule, "),
        ({"reuse": "cubic"}, "reuse is 'cubic'; expected one of 'last', 'linear'"),
        ({"batch_rule": "mean"}, "batch_rule is 'mean'; expected one of 'per_sample', 'all_reuse', "),
        ({"warmup_steps": 0}, "warmup_steps is 0; at least 1 step must compute to fill the caches"),
        ({"max_reuse_age": 0}, "max_reuse_age is 0; use 1 or more, or None for no limit"),
        ({"max_captures": 0}, "max_captures is 0; use 1 or more"),
        ({"config": {"reuse": "last"}}, "config is a dict; expected LazyConfig(...), or give options by name"),
        (
            {"config": LazyConfig(), "reuse": "last"},
            "give either config or options by name, not both; seen both config and reuse",
        ),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], expected: str) -> None:
    assert message(ConfigError, lambda: lazy_compile.transform(Small(), **options)).startswith(expected)


def test_a_timestep_input_that_does_not_exist_is_refused() -> None:
    lazy = lazy_compile.transform(SMALL.model(), timestep_input="timestep")
    assert message(ConfigError, lambda: lazy(**call(SMALL))) == (
        "timestep_input is 'timestep'; the tensor inputs of this model are x, t"
    )


def test_what_is_no_model_is_refused(shared: LazyModule) -> None:
    assert message(ConfigError, lambda: lazy_compile.transform(shared)) == (
        "this model is lazy already; use restore() to get the original back"
    )
    assert message(ConfigError, lambda: lazy_compile.transform(lambda x: x)) == (
        "transform() takes a torch.nn.Module or a diffusers pipeline; seen function"
    )
    assert message(ConfigError, lambda: lazy_compile.restore(shared.original)) == (
        "restore() takes what transform() returned; seen Small"
    )
    assert message(ConfigError, lambda: lazy_compile.transform(Small(), torch.ones(2, TOKENS, WIDTH))) == (
        "example_inputs is a Tensor; expected a dictionary of arguments, or a tuple"
    )


def test_a_model_that_decides_by_its_weights_is_refused() -> None:
    toy = REFUSED["data_dependent"]
    text = message(CaptureError, lambda: lazy_compile.transform(toy.model(), call(toy)))
    assert re.fullmatch(
        r"TinyDataDependent could not be captured: it decides by a value that depends on its weights, bool\(\) in "
        r"forward, toy_networks\.py:\d+\. Move that decision out of forward\(\), or make it a tensor operation",
        text,
    )


def test_a_model_with_nothing_to_gate_is_refused_with_the_reasons() -> None:
    plain, unet = REFUSED["plain"], REFUSED["unet"]
    assert message(NoBranchError, lambda: lazy_compile.transform(plain.model(), call(plain))) == (
        "PlainMLP has no residual branch that could be gated (no addition joins a skip connection with heavy operators)"
    )
    assert message(NoBranchError, lambda: lazy_compile.transform(unet.model(), call(unet))) == (
        "TinyUNet has no residual branch that could be gated "
        "(outer: convolution block; gate it with conv_branches=True; "
        "inner: convolution block; gate it with conv_branches=True)"
    )
