from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_model import STRATEGIES, capture
from lazy_compile.errors import CaptureError
from lazy_compile.ir.operators import macs, operator_name
from lazy_compile.ir.program import Role, module_state
from support.captures import accepts, captured_call, joined
from support.layers import MLP, WIDTH, norm, sinusoid
from support.toy_models import REFUSED, call, randomize

# What a capture serves --------------------------------------------------------------------------------------------


class Joins(nn.Module):
    """Two sequences of any length, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        h = torch.cat([text, x], dim=1) + sinusoid(t, WIDTH)[:, None]
        return (h + self.mlp(h))[:, text.shape[1] :]


def test_a_batch_of_one_gives_a_graph_for_every_batch() -> None:
    model = randomize(Joins())
    found = captured_call(model, **joined(1))
    assert found.strategy == "export, dynamic sizes"
    assert found.attempts == ()
    for batch in (1, 2, 3, 7):
        arguments = joined(batch)
        assert accepts(found, **arguments)
        values = found.program.bind(module_state(model), list(arguments.values()))
        with torch.no_grad():
            assert torch.equal(found.program.graph_module(*values)[0], model(**arguments))


class Unused(Joins):
    """It computes what it does not return, as the last block of many models does with its text."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        self.unused(text)
        return super().forward(x, text, t)


def test_work_that_nobody_reads_is_not_in_the_graph() -> None:
    counts = [
        sum(macs(node) for node in captured_call(randomize(model), **joined(2)).program.graph.nodes)
        for model in (Joins(), Unused())
    ]
    assert counts[0] == counts[1] > 0


class Apart(nn.Module):
    """Its inputs never meet, so that nothing in it says that they have the same rows."""

    def forward(self, x: Tensor, t: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x * scale, t.float().repeat_interleave(3)


def test_inputs_with_a_line_for_each_row_share_one_batch_size() -> None:
    found = captured_call(Apart(), x=torch.ones(2, 5, 4), t=torch.tensor([1, 2]), scale=torch.ones(4))
    x, t, _ = found.fake_tensors
    assert str(x.shape[0]) == str(t.shape[0]) != str(x.shape[1])
    assert accepts(found, x=torch.ones(3, 5, 4), t=torch.ones(3), scale=torch.ones(4))
    assert not accepts(found, x=torch.ones(3, 5, 4), t=torch.ones(2), scale=torch.ones(4))


def test_sizes_that_belong_together_must_agree() -> None:
    found = captured_call(Joins(), **joined(2))
    assert accepts(found, **joined(3, tokens=20, words=9))
    assert not accepts(found, **{**joined(3), "text": torch.ones(2, 5, WIDTH)})
    assert not accepts(found, **{**joined(3), "x": torch.ones(3, 16, WIDTH + 1)})  # the channels are the model's
    assert not accepts(found, **{**joined(3), "x": torch.ones(3, 2, 8, WIDTH)})


def test_a_size_that_the_model_fixes_is_guarded() -> None:
    class Lists(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([float(token) for token in range(int(x.shape[1]))])[:, None]

    found = captured_call(Lists(), x=torch.ones(2, 16, 8))
    assert accepts(found, x=torch.ones(5, 16, 8))
    assert not accepts(found, x=torch.ones(2, 17, 8))


class Halves(nn.Module):
    """Windows of four tokens: a count that is not a multiple has no graph."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).mean(dim=2) * t[:, None, None]


def test_a_relation_between_sizes_is_guarded() -> None:
    found = captured_call(Halves(), x=torch.ones(2, 16, 8), t=torch.ones(2))
    assert accepts(found, x=torch.ones(3, 24, 8), t=torch.ones(3))
    assert not accepts(found, x=torch.ones(3, 25, 8), t=torch.ones(3))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[row : row + 1].flatten(1) for row in range(x.shape[0])])


def test_a_fixed_batch_is_captured_as_it_is() -> None:
    found = captured_call(FixedBatch(), x=torch.ones(1, 16, 8))
    assert accepts(found, x=torch.ones(1, 16, 8))
    assert not accepts(found, x=torch.ones(2, 16, 8))
    assert found.attempts == ("export, dynamic sizes: the graph of a batch of 2 serves no other",)


# Strategies -------------------------------------------------------------------------------------------------------


class OnlyFixed(nn.Module):
    """Looks a size up in a table."""

    def forward(self, x: Tensor) -> Tensor:
        return x * {16: 2.0, 8: 3.0}[hash(x.shape[1])]


NAMES = [strategy.name for strategy in STRATEGIES]


def test_the_strategy_that_worked_is_named_with_those_that_failed() -> None:
    x = torch.ones(2, 16, 8)
    found = captured_call(OnlyFixed(), x=x)
    assert found.strategy in NAMES[1:]
    assert [attempt.partition(": ")[0] for attempt in found.attempts] == NAMES[: NAMES.index(found.strategy)]
    assert accepts(found, x=x)
    assert not accepts(found, x=torch.ones(2, 8, 8))
    assert torch.equal(found.program.graph_module(x)[0], 2 * x)


@pytest.mark.parametrize("strategy", range(len(STRATEGIES)))
def test_every_strategy_gives_the_same_program_under_the_same_names(
    strategy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList([MLP()])

        def __getattr__(self, name: str) -> Any:  # as the models of diffusers have: strict export then looks deeper
            return super().__getattr__(name)

        def forward(self, x: Tensor) -> dict[str, Any]:
            result = x + self.mlps[0](x)
            return {"sample": result, "none": None, "parts": (2 * result, [x + 1])}

    monkeypatch.setattr("lazy_compile.capture.capture_model.STRATEGIES", STRATEGIES[strategy : strategy + 1])
    model, arguments = randomize(Returns()), {"x": joined(2)["x"]}
    found = captured_call(model, **arguments)
    assert found.strategy == NAMES[strategy]
    paths = {node.meta["module_path"] for node in found.program.graph.nodes if operator_name(node) == "linear"}
    assert paths == {"mlps.0.up", "mlps.0.down"}
    assert found.accepts(list(arguments.values()))
    values = found.program.bind(module_state(model), list(arguments.values()))
    with torch.no_grad():
        expected = model(**arguments)
        result = pytree.tree_unflatten(found.program.graph_module(*values), found.output_spec)
    assert list(result) == ["sample", "none", "parts"]
    assert result["none"] is None
    assert torch.equal(result["sample"], expected["sample"])
    assert torch.equal(result["parts"][1][0], arguments["x"] + 1)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class WritesToItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        (Counts(), "'calls'"),
        (WritesToItsInput(), "one of its inputs"),
    ],
)
def test_a_model_that_is_no_function_of_its_inputs_is_refused(model: nn.Module, seen: str) -> None:
    with pytest.raises(CaptureError) as caught:
        captured_call(model, x=torch.ones(2, 16, 8))
    assert str(caught.value) == (
        f"the model changes {seen} while it runs; a lazy model must be a function of its inputs: "
        "move that state out of forward()"
    )


def test_a_refusal_is_one_line_and_nothing_else_is_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    toy = REFUSED["data_dependent"]
    with warnings.catch_warnings(record=True) as caught, pytest.raises(CaptureError) as error:
        captured_call(toy.model(), **call(toy))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not caught


# The model is left as it was --------------------------------------------------------------------------------------


def test_a_capture_is_made_in_evaluation_mode_and_leaves_the_flags() -> None:
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 8))
    model[1].eval()
    model[0].train()
    levels = {name: logging.getLogger(name).level for name in ("torch.export", "torch.fx")}
    layout, tensors = CallLayout.of((torch.ones(2, 16, 8),), {})
    found = capture(model.train(), layout, tensors)
    assert model.training
    assert model[1].training
    assert {name: logging.getLogger(name).level for name in levels} == levels
    (output,) = found.program.graph_module(*found.program.bind(module_state(model), tensors))
    assert torch.equal(output, model.eval()(*tensors))  # no dropout


class Doubled(nn.Module):
    """One weight under two names, a buffer, a plain tensor and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(8))
        self.plain = torch.full((8,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(norm(self.first(x) + self.shift) * self.plain) + torch.tensor([3.0] * 8)


class Table:
    """Made at the first call and kept, as rotary embeddings often are."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, length: int) -> Tensor:
        if not self.rows:
            self.rows.append(sinusoid(torch.arange(64), WIDTH))
        return self.rows[0][:length]


class KeepsATable(Joins):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.calls: dict[str, Tensor] = {}

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        self.calls["latest"] = x
        self.latest = x
        return super().forward(x + self.table(x.shape[1]), text, t)


def test_what_a_model_keeps_for_later_calls_is_not_made_of_tensors_of_the_trace() -> None:
    model = randomize(KeepsATable())
    arguments = joined(2)
    found = captured_call(model, **arguments)
    assert not model.table.rows
    assert not model.calls
    assert not hasattr(model, "latest")
    values = found.program.bind(module_state(model), list(arguments.values()))
    with torch.no_grad():
        assert torch.equal(found.program.graph_module(*values)[0], model(**arguments))


@functools.lru_cache
def noted_positions(length: int) -> Tensor:
    return sinusoid(torch.arange(length).float(), WIDTH)


def wrapped(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    memo = functools.lru_cache(function)
    return lambda length: memo(length)


@wrapped
def noted_inside(length: int) -> Tensor:
    return torch.ones(length, WIDTH)


class KeepsMemos(Doubled):
    """Notes tables with ``functools.lru_cache``: of a method, of a function beside it, and inside a wrapper."""

    @functools.lru_cache  # noqa: B019
    def scale(self, length: int) -> Tensor:
        return torch.full((length, WIDTH), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        tables = noted_positions(4), noted_inside(4), self.scale(4)
        return super().forward(x) + sum(table.mean() for table in tables)


def test_what_a_model_memoises_is_not_made_of_tensors_of_the_trace() -> None:
    model = randomize(KeepsMemos())
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    captured_call(model, x=x)
    for table in (noted_positions(4), noted_inside(4), model.scale(4)):
        assert type(table) is Tensor
    assert type(model(x)) is Tensor


def test_inputs_are_known_by_their_role_and_name() -> None:
    model = randomize(Doubled())
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    found = captured_call(model, x=x)
    roles = {item.name: item.role for item in found.program.inputs}
    assert roles["first.bias"] is Role.PARAMETER
    assert roles["shift"] is Role.BUFFER
    assert roles["x"] is Role.USER
    assert list(roles.values()).count(Role.CONSTANT) == len(found.program.constants) == 2
    (output,) = found.program.graph_module(*found.program.bind(module_state(model), [x]))
    assert torch.equal(output, model(x))
