"""Extrapolation from computed values: its weights in PyTorch, and the same as formulas over operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lazy_compile.ir.extrapolation import CLOCK, advance_clock, clock_names, moved_on, new_difference, read_clock
from lazy_compile.runtime.cache import NEVER, extrapolation_weights
from support.span_oracle import extrapolated


def weights(step: int, *places: int) -> list[float]:
    at, *before = places
    found = extrapolation_weights(np.array([step]), np.array([at]), np.array(before)[:, None])
    return found[:, 0].tolist()


def test_the_line_counts_whole_and_what_the_parabola_adds_counts_half() -> None:
    assert weights(5, 4, 2) == pytest.approx([-0.5])
    # Computed at 0, 2, 4 and asked for at 5: the parabola weighs 4, 2, 0 by 15/8, -10/8, 3/8; the line by 12/8, -4/8.
    assert weights(5, 4, 2, 0) == pytest.approx([(-10 / 8 - 4 / 8) / 2, 3 / 8 / 2])


def test_rows_with_fewer_values_have_fewer_terms() -> None:
    assert weights(5, 4, 2, NEVER, NEVER) == pytest.approx([*weights(5, 4, 2), 0, 0])
    assert weights(5, 4, NEVER, NEVER) == [0, 0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_formulas_over_operators_follow_the_same_weights(order: int) -> None:
    """A trajectory in which one branch computes at uneven steps, held against a third writing of the rule."""
    draw = torch.Generator().manual_seed(0)
    clock = [torch.full((1,), CLOCK[name]) for name in clock_names(order)]
    cache, differences = torch.zeros(4), [torch.zeros(4) for _ in range(order)]
    known: list[tuple[int, torch.Tensor]] = []
    for step in range(14):
        computes, slope = torch.tensor([step in (0, 1, 3, 6, 7, 11)]), torch.ones(1)
        moved = clock[1 + order :]
        if computes:
            fresh = torch.randn(4, generator=draw)
            newest = new_difference(fresh, cache, differences, moved, torch.float32)
            cache, differences = fresh, [newest, *differences][:order]
            known = [(step, fresh.double()), *known][: order + 1]
        else:
            cache = moved_on(cache, differences, read_clock(order, clock, slope), torch.float32)
            expected = extrapolated([at for at, _ in known], [value for _, value in known], step)
            torch.testing.assert_close(cache.double(), expected, rtol=1e-4, atol=1e-4)
            (_, last), *earlier = known
            factors = weights(step, *(at for at, _ in known))
            again = last + sum(factor * (value - last) for factor, (_, value) in zip(factors, earlier, strict=True))
            torch.testing.assert_close(again, expected)
        clock = list(advance_clock(order, computes, clock, slope))
