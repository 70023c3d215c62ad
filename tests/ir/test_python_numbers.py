"""Python numbers among the arguments: those that change become tensors where the model allows it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import LazyModule
from support.layers import TOKENS, WIDTH
from support.slow import slow_but
from support.small_model import NEVER, SMALL, Wraps, reused, run, same
from support.toy_models import call, randomize, trajectory

STEPS = [0.9, 0.7, 0.3, 0.1]


def lazily(kind: type[Wraps], **options: Any) -> LazyModule:
    return lazy_compile.transform(randomize(kind()).eval(), **options)


def steps(name: str, values: list[Any], **others: Any) -> list[dict[str, Any]]:
    x = call(SMALL)["x"]
    return [{"x": x + 0.1 * index, name: value, **others} for index, value in enumerate(values)]


class Builds(Wraps):
    """Makes a tensor of its time as pipelines' own models do."""

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        times = timestep if torch.is_tensor(timestep) else torch.tensor([timestep], dtype=torch.float64)
        return self.small(x, times.reshape(-1).expand(x.shape[0]) * 1000)


class Fills(Wraps):
    def forward(self, x: Tensor, timestep: float) -> Tensor:
        return self.small(x, torch.full((x.shape[0],), 1000 * timestep))


class Lists(Wraps):
    def forward(self, x: Tensor, timestep: float) -> Tensor:
        return self.small(x, x.new_tensor([timestep * 1000] * x.shape[0]))


WHOLE = (900, 700, 300, 100)
CASES = [(kind, values) for kind in (Builds, Fills, Lists) for values in (tuple(STEPS), WHOLE)]


@pytest.mark.parametrize(("kind", "values"), slow_but([*CASES[::2], (Fills, WHOLE)], CASES))
def test_a_time_given_as_a_number_is_an_input_from_the_first_call(kind: type[Wraps], values: tuple[Any, ...]) -> None:
    lazy = lazily(kind)
    calls = steps("timestep", list(values))
    assert same(run(lazy, calls), run(lazy.original, calls))
    assert lazy.stats.captures == 1
    assert lazy.graph.timestep_input == "timestep"
    lazy.policy = NEVER
    run(lazy, calls + calls)
    assert [row[0] for row in reused(lazy)] == [0.0, 1.0, 1.0, 1.0]  # both trajectories are distinguished


class Scaled(Wraps):
    def forward(self, x: Tensor, t: Tensor, scale: float, causal: bool = False) -> Tensor:
        return self.small(x, t) * scale


def test_another_number_becomes_an_input_once_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazily(Scaled)
    calls = [{**one, "scale": 1.0 + step} for step, one in enumerate(trajectory(SMALL, steps=4))]
    with caplog.at_level(logging.INFO, "lazy_compile"):
        assert same(run(lazy, calls), run(lazy.original, calls))
    assert lazy.stats.captures == 2
    told = [record.getMessage() for record in caplog.records]
    assert told.count("Scaled: the Python number scale is an input of the graph, as a tensor") == 1
    assert lazy.graph.layout.names == ("x", "t", "scale")


class Repeats(Wraps):
    """A number that says how often: no tensor can."""

    def forward(self, x: Tensor, t: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = self.small(x, t)
        return x


class Decides(Wraps):
    def forward(self, x: Tensor, t: Tensor, strength: float) -> Tensor:
        return self.small(x, t) if strength > 0.5 else self.small(-x, t)


class AsksForFloats(Wraps):
    """Takes a tensor for something else."""

    def forward(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        return self.small(x, t) * (scale if isinstance(scale, float) else 1.0)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (Repeats, "times", [1, 2, 1]),
        (Decides, "strength", [1.0, 0.0, 1.0]),
        (AsksForFloats, "scale", [1.0, 3.0, 1.0]),
    ],
)
def test_a_number_that_the_model_needs_as_one_is_captured_for_each_value_and_told_once(
    kind: type[Wraps], name: str, values: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    lazy = lazily(kind)
    calls = steps(name, values, t=call(SMALL)["t"])
    assert same(run(lazy, calls), run(lazy.original, calls))
    assert same(run(lazy, calls), run(lazy.original, calls))
    assert lazy.stats.captures == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{kind.__name__} was captured again for another value of the Python number {name}: such a value is part of "
        "the graph; pass what changes from step to step as a tensor"
    )


def test_the_number_that_the_user_names_is_the_time() -> None:
    class Renamed(Wraps):
        def forward(self, x: Tensor, noise: float) -> Tensor:
            return self.small(x, torch.full((x.shape[0],), noise))

    lazy = lazily(Renamed, timestep_input="noise")
    calls = steps("noise", STEPS)
    assert same(run(lazy, calls), run(lazy.original, calls))
    assert lazy.graph.timestep_input == "noise"
    assert lazy.stats.captures == 1


def test_numbers_lists_and_dictionaries_may_be_nested() -> None:
    class Nested(Wraps):
        def forward(self, latents: list[Tensor], conditions: dict[str, Any]) -> dict[str, Any]:
            h = torch.stack(latents) + conditions["extra"][0]["bias"]
            return {"samples": list(self.small(h, conditions["extra"][1]).unbind(0)), "count": conditions["count"]}

    lazy = lazily(Nested)
    x, t = call(SMALL).values()
    calls = [
        {
            "latents": list(x + step),
            "conditions": {"extra": [{"bias": torch.ones(TOKENS, WIDTH) * step}, t - step], "count": 3},
        }
        for step in range(3)
    ]
    with torch.no_grad():
        for arguments in calls:
            seen, expected = lazy(**arguments), lazy.original(**arguments)
            assert seen["count"] == 3
            assert isinstance(seen["samples"], list)
            assert same(seen["samples"], expected["samples"])
    assert lazy.stats.captures == 1
    assert lazy.graph.layout.names == ("latents.0", "latents.1", "conditions.extra.0.bias", "conditions.extra.1")
