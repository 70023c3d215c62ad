"""Python numbers that a model makes of sizes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile.capture.symbolic_numbers import sizes_stay_symbolic
from support.layers import WIDTH
from support.small_model import Wraps, run, same
from support.toy_models import randomize


class Rotates(Wraps):
    """Takes as many lines of a table as there are tokens, and counts them in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(-1.0, 1.0, 64 * WIDTH).reshape(64, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = int(x.shape[1])
        assert isinstance(tokens, int)
        lines = self.table[4 : 4 + tokens] / torch.as_tensor(tokens, device=x.device)
        return self.small(x + lines + 0.1 * int(tokens / 2), t)


class Counts(Wraps):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = len(x)
        return self.small(x.reshape(rows, -1, WIDTH), t)


class Loops(Wraps):
    """Its sizes are the length of a loop."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.small(torch.cat([x[:, place : place + 1] for place in range(int(x.shape[1]))], dim=1), t)


def shaped(batch: int, tokens: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(batch + tokens)
    return {"x": torch.randn(batch, tokens, WIDTH, generator=draw), "t": torch.full((batch,), 500.0)}


@pytest.mark.parametrize("kind", [Rotates, Counts])
@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_stay_free(kind: type[nn.Module], batch: int, caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(kind()).eval(), shaped(batch, 16))
    for given in (shaped(batch, 16), shaped(3, 16), shaped(2, 11), shaped(2, 30)):
        assert same(run(lazy, [given]), run(lazy.original, [given]))
    assert lazy.stats.captures == 1
    assert not [record for record in caplog.records if "captured again" in record.getMessage()]


def test_a_size_that_stays_fixed_is_said_once_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(Loops()).eval(), shaped(2, 4))
    for tokens in (5, 6, 4):
        assert same(run(lazy, [shaped(2, tokens)]), run(lazy.original, [shaped(2, tokens)]))
    (told,) = [record.getMessage() for record in caplog.records if "captured again" in record.getMessage()]
    assert "axis 1 of x, fixed in forward, test_symbolic_numbers.py:" in told


def test_the_names_mean_what_they_did_afterwards() -> None:
    module: Any = sys.modules[__name__]

    def use() -> None:
        assert isinstance(3, module.int)
        assert issubclass(bool, module.int)
        assert module.int == int  # noqa: E721
        assert module.int("7") == int("7", 10) == module.int(7.9)
        raise RuntimeError

    with pytest.raises(RuntimeError), sizes_stay_symbolic(Rotates()):
        use()
    assert not hasattr(module, "int")
    assert not hasattr(module, "len")
