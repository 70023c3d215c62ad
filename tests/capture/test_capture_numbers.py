"""What Python and NumPy make of sizes while a model is captured."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lazy_compile import transform
from lazy_compile.capture.capture_model import STRATEGIES
from lazy_compile.errors import CaptureError
from lazy_compile.ir.program import module_state
from support.captures import accepts, captured_call, joined
from support.layers import MLP, WIDTH
from support.slow import slow_but
from support.toy_models import randomize


class CountsRows(nn.Module):
    """Makes a Python number of its batch size: by ``len()``, or from its windows as Swin transformers do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mlp = MLP()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 4, WIDTH)
        rows = len(x) if self.how == "len" else int(windows.shape[0] / (16 / 4))
        return x + self.mlp(windows).view(rows, 16, -1)


@pytest.mark.parametrize("how", slow_but(["len"], ["len", "int"]))
def test_a_batch_that_became_a_number_stays_dynamic(how: str) -> None:
    model, x = randomize(CountsRows(how)), joined(2)["x"]
    found = captured_call(model, x=x)
    assert found.strategy == "export, dynamic sizes"
    (reason,) = found.attempts
    assert reason.startswith(f"export, dynamic sizes: a size is fixed by {how}() in forward, test_capture_numbers.py:")
    lazy = transform(model, (x,))
    assert [branch.row_separable for branch in lazy.branches] == [True]
    for rows in (2, 3):
        x = joined(rows)["x"]
        assert accepts(found, x=x)
        assert torch.equal(lazy(x), model(x))
    assert lazy.stats.captures == 1


NUMBER = int
"""A name that nobody shadows."""


class CountsByAnotherName(CountsRows):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(NUMBER(x.shape[0]), 16, -1))


def test_under_another_name_it_stays_dynamic_in_strict_export() -> None:
    found = captured_call(randomize(CountsByAnotherName("len")), x=joined(2)["x"])
    assert found.strategy == "strict export, dynamic batch"
    assert accepts(found, x=joined(3)["x"])


def test_it_is_fixed_where_strict_export_fails() -> None:
    class LooksAround(CountsByAnotherName):
        def forward(self, x: Tensor) -> Tensor:
            assert sys._getframe().f_code.co_name == "forward"
            return super().forward(x)

    x = joined(2)["x"]
    found = captured_call(randomize(LooksAround("len")), x=x)
    assert found.strategy == "export, dynamic sizes"
    assert accepts(found, x=x)
    assert not accepts(found, x=joined(3)["x"])


class Rescales(nn.Module):
    """Divides by what NumPy makes of a size, and by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gains, self.linear = nn.Parameter(torch.empty(8)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x / np.sqrt(x.shape[1]))
        return torch.cat([x, *(y * (gain / np.sqrt(24)) for gain in self.gains.unbind())])


def test_numpy_takes_the_root_of_a_size_that_stays_dynamic() -> None:
    model, x = randomize(Rescales()), joined(2)["x"]
    found = captured_call(model, x=x)
    assert (found.strategy, found.attempts) == ("export, dynamic sizes", ())
    x = torch.randn(3, 9, WIDTH)
    assert accepts(found, x=x)
    with torch.no_grad():
        assert torch.equal(found.program.graph_module(*found.program.bind(module_state(model), [x]))[0], model(x))
    assert not hasattr(torch.SymInt, "sqrt"), "as torch has it, outside of a capture"


def test_a_capture_that_rounds_otherwise_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lazy_compile.capture.capture_model.STRATEGIES", STRATEGIES[1:2])
    captured_call(randomize(Rescales()), x=joined(2)["x"])
    (record,) = caplog.records
    assert record.getMessage().startswith("the captured Rescales differs from the original by up to ")


def test_a_program_that_cannot_be_run_is_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heads(nn.Module):
        """Every head is a function that torch maps over its weights; export writes a program that torch refuses."""

        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Parameter(torch.empty(4, WIDTH, WIDTH // 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.vmap(lambda head: x @ head, out_dims=-1)(self.heads).flatten(-2)

    monkeypatch.setattr("lazy_compile.capture.capture_model.STRATEGIES", STRATEGIES[1:2])
    with pytest.raises(CaptureError, match="SymIntArrayRef"):
        captured_call(randomize(Heads()), x=joined(2)["x"])


class Parts(nn.Module):
    """Its parts are called like words of Python; a region of autocast has the whole program traced again."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.parts, self.autocast = nn.ModuleDict({"in": MLP(), "out": MLP()}), autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=True) if self.autocast else nullcontext():
            return x + self.parts["in"](x)


def test_a_module_that_is_called_like_a_word_of_python_is_captured() -> None:
    model, x = randomize(Parts(autocast=False)), joined(2)["x"]
    program = captured_call(model, x=x).program
    with torch.no_grad():
        assert torch.equal(program.graph_module(*program.bind(module_state(model), [x]))[0], model(x))


def test_where_it_cannot_be_it_is_named() -> None:
    with pytest.raises(CaptureError, match=r"called like a word of Python, 'parts\.in': rename it"):
        captured_call(randomize(Parts(autocast=True)), x=joined(2)["x"])
