"""Ways in which research code brings a branch back into its stream, and what is found there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lazy_compile import CacheSchedule, Scheduled
from support.oracle import Oracle
from support.published_model import TOKENS, WIDTH, lazily, mlp


class Residuals(nn.Module):
    """Two MLPs, and a way to bring what each makes back into the stream."""

    def __init__(self, bring_back: Callable[[Residuals, Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bring_back = bring_back
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.mlps, self.cell = nn.ModuleList(mlp() for _ in range(2)), nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + t[:, None, None]
        for branch in self.mlps:
            x = self.bring_back(self, x, branch)
        return self.last(x)


def by_a_cell(self: Residuals, x: Tensor, branch: nn.Module) -> Tensor:
    """GTrXL, arXiv 1910.06764."""
    together: Tensor = self.cell(branch(x).flatten(0, 1), x.flatten(0, 1))
    return together.view_as(x)


WAYS = {"GRU cell": by_a_cell}


@pytest.mark.parametrize("name", WAYS)
def test_a_branch_is_found_and_is_what_the_module_makes(name: str) -> None:
    model = Residuals(WAYS[name]).eval()
    lazy = lazily(model, *TOKENS)
    assert [(branch.kind.value, branch.row_separable) for branch in lazy.branches] == [("mlp", True)] * 2
    table = CacheSchedule.every(2, 4, 2)
    lazy.policy = Scheduled(table)
    oracle = Oracle(model, ["mlps.0", "mlps.1"], table.should_compute, "last")
    x, t = TOKENS
    with torch.no_grad():
        assert torch.equal(lazy(x, t), model(x, t))
        oracle(x=x, t=t)
        torch.testing.assert_close(lazy(x, t - 0.5), oracle(x=x, t=t - 0.5), rtol=0, atol=1e-6)
    assert lazy.stats.lazy_ratio == 0.5
