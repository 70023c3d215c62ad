from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch
from lazy_compile.policies.gate_table import FORCE, GateTable, compute_logit, pool_entry, should_compute


def branch(*entries: BranchTensor, apart: bool = True) -> ResidualBranch:
    return ResidualBranch(0, "b", BranchKind.MLP, "", 1, entries, (), apart)


def entry(shape: tuple[int, ...], batch_axis: int | None = 0, channel_axis: int = -1) -> BranchTensor:
    return BranchTensor("e", shape, "float32", batch_axis, channel_axis, 4 * math.prod(shape))


def table(interpolation: str = "nearest", knots: tuple[float, ...] = (900.0, 500.0, 100.0)) -> GateTable:
    rows = torch.arange(float(len(knots)))[:, None]
    return GateTable(
        (2, 1), torch.tensor(knots, dtype=torch.float64), rows * torch.ones(3), rows * torch.ones(2), interpolation
    )


# Pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "batch_axis", "channel_axis", "axes"),
    [
        ((2, 5, 3), 0, -1, (1,)),  # tokens
        ((5, 2, 3), 1, -1, (0,)),  # tokens first
        ((2, 3, 4, 4), 0, 1, (2, 3)),  # an image, channels second
        ((2, 4, 4, 3), 0, 3, (1, 2)),
        ((2, 3), 0, -1, ()),  # one vector per sample
    ],
)
def test_an_entry_is_averaged_over_its_tokens(
    shape: tuple[int, ...], batch_axis: int, channel_axis: int, axes: tuple[int, ...]
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = values.mean(dim=axes) if axes else values
    torch.testing.assert_close(pool_entry(values, batch_axis, channel_axis), expected)


def test_an_entry_without_a_batch_axis_is_averaged_into_one_row() -> None:
    values = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    pooled = pool_entry(values, None, -1)
    torch.testing.assert_close(pooled, values.mean(dim=(0, 1))[None])


def test_pooling_is_done_in_single_precision() -> None:
    values = torch.full((1, 4096, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    pooled = pool_entry(values, 0, -1)
    assert pooled.dtype == torch.float32
    assert float(pooled) == 1.0 + 2**-7


# The logit --------------------------------------------------------------------------------------------------------


def test_the_logit_is_the_formula_of_the_paper_with_a_mean() -> None:
    first, second = torch.ones(2, 4, 3), torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    described = branch(entry((2, 4, 3)), entry((2, 1, 2)))
    weight = torch.tensor([1.0, 1.0, 1.0, 10.0, 100.0])
    assert compute_logit(described, [first, second], weight, torch.tensor(0.5)).tolist() == [13.5, 303.5]


def test_a_branch_whose_rows_mix_has_one_logit() -> None:
    values = torch.tensor([[[1.0]], [[3.0]]])
    described = branch(entry((2, 1, 1)), apart=False)
    assert compute_logit(described, [values], torch.ones(1), torch.zeros(())).tolist() == [2.0]


def test_a_half_precision_model_has_single_precision_logits() -> None:
    described = branch(entry((2, 4, 3)))
    logit = compute_logit(described, [torch.ones(2, 4, 3).half()], torch.ones(3).half(), torch.zeros(()).half())
    assert (logit.dtype, logit.shape) == (torch.float32, (2,))


def test_only_a_positive_logit_or_none_at_all_computes() -> None:
    logits = torch.tensor([1e-9, 0.0, -1e-9, math.inf, -math.inf, math.nan])
    assert should_compute(logits).tolist() == [True, False, False, True, False, True]


def test_force_outweighs_whatever_a_gate_reads() -> None:
    described = branch(entry((1, 4, 3)))
    for sign in (1.0, -1.0):
        logit = compute_logit(
            described, [torch.full((1, 4, 3), -sign * 1e4)], torch.ones(3), torch.tensor(sign * FORCE)
        )
        assert should_compute(logit).tolist() == [sign > 0]


# Tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("timestep", "value"), [(900, 0), (701, 0), (699, 1), (500, 1), (100, 2), (2000, 0), (-5, 2)])
def test_the_nearest_row_serves_a_timestep(timestep: float, value: float) -> None:
    row = table().row(timestep)
    assert row.weight.tolist() == [value] * 3
    assert row.bias.tolist() == [value] * 2


@pytest.mark.parametrize(
    ("timestep", "value"), [(900, 0.0), (700, 0.5), (600, 0.75), (500, 1.0), (200, 1.75), (2000, 0.0), (-5, 2.0)]
)
@pytest.mark.parametrize("rising", [False, True])
def test_rows_are_interpolated_between_knots_whichever_way_time_goes(
    timestep: float, value: float, rising: bool
) -> None:
    gates = table("linear", (-900.0, -500.0, -100.0) if rising else (900.0, 500.0, 100.0))
    row = gates.row(-timestep if rising else timestep)
    assert row.weight.tolist() == pytest.approx([value] * 3)
    assert row.bias.tolist() == pytest.approx([value] * 2)


def test_knots_that_repeat_are_no_obstacle() -> None:
    """A second-order sampler asks twice at one time."""
    gates = table("linear", (900.0, 500.0, 500.0, 100.0))
    assert gates.row(300.0).bias.tolist() == pytest.approx([2.5] * 2)
    assert gates.row(700.0).bias.tolist() == pytest.approx([0.5] * 2)
    assert gates.row(500.0).bias.tolist() in ([1.0] * 2, [2.0] * 2)


def test_one_knot_serves_all_times() -> None:
    assert table("linear", (500.0,)).row(3.0).bias.tolist() == [0.0, 0.0]


def test_constant_gates_have_no_weight() -> None:
    gates = GateTable.constant(
        [branch(entry((2, 4, 3))), branch(entry((2, 4, 8, 8), channel_axis=1))], torch.arange(5), bias=-2.0
    )
    assert gates.features == (3, 4)
    assert gates.knots.dtype == torch.float64
    assert gates.weight.shape == (5, 7)
    assert not gates.weight.any()
    assert (gates.bias == -2.0).all()
    assert gates.bias.shape == (5, 2)


def test_shifting_moves_every_bias_of_a_copy() -> None:
    gates = table()
    moved = gates.shifted(-0.5)
    assert torch.equal(moved.bias, gates.bias - 0.5)
    assert torch.equal(moved.weight, gates.weight)
    assert gates.bias[0, 0] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ((2, 1), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, 2)),
            "a gate table for 2 branches and 3 knots has weight [3, 3] and bias [3, 2]; seen [3, 2] and [3, 2]",
        ),
        (
            ((2, 1), torch.zeros(3), torch.zeros(3, 3), torch.zeros(3)),
            "a gate table for 2 branches and 3 knots has weight [3, 3] and bias [3, 2]; seen [3, 3] and [3]",
        ),
        (
            ((2, 1), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, 2)),
            "a gate table needs at least one knot; give the timesteps that its rows belong to",
        ),
        (
            ((1,), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1), "cubic"),
            "interpolation is 'cubic'; expected 'nearest' or 'linear'",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GateTable(*arguments)
    assert str(caught.value) == message


# Several trajectories ---------------------------------------------------------------------------------------------


def joined() -> GateTable:
    """Rows 0 to 3 are of four steps, rows 4 and 5 of two that the four pass through as well."""
    both = [table(knots=(900.0, 700.0, 500.0, 300.0)), table(knots=(900.0, 500.0)).shifted(4.0)]
    return GateTable.joined(both)


@pytest.mark.parametrize(
    ("timestep", "before", "value"),
    [(700, 900, 1), (500, 700, 2), (300, 500, 3), (500, 900, 5), (495, 890, 5), (305, 490, 3)],
)
def test_each_trajectory_follows_its_own_rows(timestep: float, before: float, value: float) -> None:
    assert joined().row(timestep, before).bias.tolist() == [value] * 2


def test_trajectories_with_as_many_steps_are_told_apart_too() -> None:
    gates = GateTable.joined([table(knots=(900.0, 500.0)), table(knots=(800.0, 500.0)).shifted(4.0)])
    assert [gates.row(500, before).bias[0].item() for before in (900, 800)] == [1.0, 5.0]


def test_the_first_step_of_a_trajectory_follows_none_of_another() -> None:
    gates = GateTable.joined([table(knots=(900.0, 500.0)), table(knots=(950.0, 600.0)).shifted(4.0)])
    assert gates.row(940, 950).bias[0].item() == 4.0


@pytest.mark.parametrize(
    ("timestep", "before", "foreign"),
    [(700, 900, False), (300, 500, False), (500, 900, False), (690, 880, False), (620, 700, True), (300, 700, True)],
)
def test_timesteps_that_no_row_was_calibrated_on_are_foreign(timestep: float, before: float, foreign: bool) -> None:
    assert joined().is_foreign(timestep, before) is foreign


def test_rows_between_knots_serve_any_timestep() -> None:
    assert not table("linear").is_foreign(650, 660)
    assert table().is_foreign(650, 660)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (GateTable((3,), torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 1)), "of different models"),
        (table("linear"), "calibrate without knots"),
    ],
)
def test_tables_that_have_nothing_in_common_are_not_joined(other: GateTable, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GateTable.joined([table(), other])


def test_a_table_without_slopes_joins_as_one_that_follows_its_lines_all_the_way() -> None:
    gates = GateTable.joined([table(), replace(table(knots=(950.0, 600.0)), slope=torch.full((2, 2), 0.5))])
    assert gates.slopes(500, 900) == [1.0, 1.0]
    assert gates.slopes(600, 950) == [0.5, 0.5]
    assert joined().slope is None


def test_a_table_of_several_trajectories_says_so_of_every_knot() -> None:
    with pytest.raises(ConfigError, match=r"which one each of its 3 knots belongs to.*seen \[2\] and 'nearest'"):
        replace(table(), trajectory=torch.zeros(2))
