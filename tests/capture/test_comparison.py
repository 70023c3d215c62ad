"""A graph is held against the model before it is believed."""

from __future__ import annotations

import logging
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile.capture.comparison import ExampleResult
from lazy_compile.errors import CaptureError
from support.captures import captured_call, joined
from support.layers import MLP, WIDTH
from support.small_model import SMALL, Small
from support.toy_models import call, randomize


def activation(x: Tensor) -> Tensor:
    return torch.tanh(x)


def doubled(x: Tensor) -> Tensor:
    return 2 * activation(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    SCRIPTED = torch.jit.script(doubled)


def activation(x: Tensor) -> Tensor:  # type: ignore[no-redef]  # noqa: F811
    return torch.relu(x)


class CallsAScript(nn.Module):
    """Runs what was compiled, which is not what its source says now."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(SCRIPTED(x))


def test_a_graph_that_returns_something_else_is_none() -> None:
    model, x = randomize(CallsAScript()), joined(2)["x"]
    with pytest.raises(CaptureError) as caught:
        captured_call(model, x=x)
    text = str(caught.value)
    assert text.startswith("CallsAScript could not be captured; export, dynamic sizes: its graph is off by ")
    assert "look for a function of torch.jit.script whose source has changed" in text
    assert "\n" not in text


def test_a_model_that_fails_by_itself_is_said_to() -> None:
    with pytest.raises(CaptureError, match=r"Small itself fails on the example: RuntimeError: The size of tensor a"):
        captured_call(randomize(Small()), x=torch.ones(2, 4, WIDTH), t=torch.ones(3))


def test_there_is_nothing_to_compare_on_the_meta_device() -> None:
    found = captured_call(Small().to("meta"), x=torch.ones(2, 4, WIDTH, device="meta"), t=torch.ones(2, device="meta"))
    assert found.attempts == ("not compared with the model: tensors on the meta device hold no values",)


class Jitters(Small):
    """Adds noise, also in evaluation mode."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x), t)


def test_a_model_that_draws_random_numbers_is_compared_with_the_same_ones(caplog: pytest.LogCaptureFixture) -> None:
    model = randomize(Jitters())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    with caplog.at_level(logging.INFO, "lazy_compile"):
        captured_call(model, x=torch.ones(2, 4, WIDTH), t=torch.ones(2))
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2]) == states[1:]


class RoundsWhenCompiled(Small):
    """Its author compiled a part of it, with a backend that gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp.compile(backend=lambda graph, inputs: lambda *values: [1e3 * value for value in graph(*values)])


def test_what_its_author_compiled_is_compared_as_it_was_written() -> None:
    captured_call(randomize(RoundsWhenCompiled()), x=torch.ones(2, 4, WIDTH), t=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_is_that_of_the_coarsest_type(dtype: torch.dtype) -> None:
    results = [ExampleResult((torch.ones(4),), allowed=1e-4), ExampleResult((torch.ones(4),), allowed=5e-2)]
    off = torch.ones(4) + (1e-3 if dtype == torch.float32 else 0.04)
    assert "off by 1.0e-03" in results[0].mismatch([torch.ones(4) + 1e-3])
    assert not results[1].mismatch([off])
    assert "2 values" in results[1].mismatch([off, off])
    assert "bfloat16[4]" in results[1].mismatch([off.bfloat16()])
    assert "off by inf" in results[1].mismatch([torch.full((4,), float("nan"))])


# What the call of the model leaves behind -------------------------------------------------------------------------

TABLES: dict[int, Tensor] = {}
LATEST: Tensor | None = None


class KeepsTablesInItsFile(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        global LATEST
        if 4 not in TABLES:
            TABLES[4] = torch.arange(4.0)[:, None]
        LATEST = x
        return super().forward(x + TABLES[4], t)


def test_variables_of_its_file_hold_no_tensors_of_the_trace() -> None:
    model, x, t = randomize(KeepsTablesInItsFile()).eval(), torch.ones(2, 4, WIDTH), torch.ones(2)
    lazy = lazy_compile.transform(model, (x, t))
    assert not TABLES
    assert LATEST is None
    with torch.no_grad():
        assert type(model(x, t)) is Tensor
        assert torch.equal(lazy(x, t), model(x, t))
    TABLES.clear()


class Statistics(Small):
    """Follows a mean while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.mean.lerp_(x.mean((0, 1)), 0.5)
        return super().forward(x - self.mean, t)


def test_a_refused_model_keeps_the_values_of_its_buffers() -> None:
    model = randomize(Statistics()).eval()
    with pytest.raises(CaptureError, match="changes 'mean'"):
        lazy_compile.transform(model, call(SMALL))
    assert not model.mean.any()
