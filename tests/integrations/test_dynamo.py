"""The backend of torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import nn

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.integrations import dynamo
from support.toy_models import TOYS, randomize, trajectory

STEPS = 6
DIT = TOYS["dit"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> nn.Module:
    return randomize(DIT.build()).eval()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=dynamo.backend, options=options or None)


@torch.no_grad()
def test_it_follows_transform_step_by_step(model: nn.Module) -> None:
    calls = trajectory(DIT, steps=STEPS)
    direct = lazy_compile.transform(model, calls[0], reuse="last")
    schedule = Scheduled(CacheSchedule.every(2, STEPS, len(direct.branches)))
    direct.policy = schedule
    through_dynamo = compiled(model, reuse="last", policy=schedule)
    for call in calls:
        assert torch.equal(through_dynamo(**call), direct(**call))
    lazy = dynamo.lazy_modules()[-1]
    assert lazy.stats.lazy_ratio == 0.5
    assert [branch.name for branch in lazy.branches] == [branch.name for branch in direct.branches]


@torch.no_grad()
def test_weights_changed_afterwards_are_used(model: nn.Module) -> None:
    call = trajectory(DIT, steps=1)[0]
    through_dynamo = compiled(model)
    through_dynamo(**call)
    for parameter in model.parameters():
        parameter.mul_(0.9)
    assert torch.equal(through_dynamo(**call), model(**call))


@torch.no_grad()
def test_a_graph_without_branches_runs_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(compiled(model)(x), model(x))
    assert "runs dense" in caplog.text


def test_unknown_options_are_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="unknown option 'rause'"):
        dynamo.backend(torch.fx.symbolic_trace(nn.Linear(1, 1)), [], options={"rause": "last"})


def test_torch_finds_it_by_name() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="lazy_compile")
    assert entry.load() is dynamo.backend
