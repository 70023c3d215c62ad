from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloatTrueDiv, FloorToInt, IntTrueDiv, ToFloat, TruncToInt

from lazy_compile.ir.operators import (
    exact,
    example_size,
    is_dense_convolution,
    is_heavy,
    is_random,
    macs,
    note_example_sizes,
    operator_name,
    origins,
    shape_of,
    size_hint,
    value_of,
)
from lazy_compile.ir.program import Program
from support.graph_text import program
from support.toy_models import REFUSED, TOYS, Toy, call, counted_by_torch

INPUTS = """
    x: f32[B, N, 8]
    image: f32[B, 8, N, N]
    w: param f32[4, 8]
    b: param f32[4]
    m: param f32[8, 6]
    k3: param f32[16, 8, 3, 3]
    k1: param f32[16, 8, 1, 1]
    depth: param f32[8, 1, 3, 3]
    grouped: param f32[16, 4, 3, 3]
    up: param f32[8, 16, 2, 2]
    flat: param f32[5, 8]
    kernel: param f32[16, 8, 3]
"""


def last(line: str) -> torch.fx.Node:
    found = program(f"{INPUTS}    {line}\n    return y")
    return next(node for node in found.graph.nodes if node.name == "y")


# Cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),  # B is 2, N is 16
    [
        ("y = linear(x, w, b)", 2 * 16 * 8 * 4),
        ("y = matmul(x, m)", 2 * 16 * 8 * 6),
        ("y = mm(flat, m)", 5 * 8 * 6),
        ("t = matmul(flat, m)\n y = addmm(t, flat, m)", 5 * 8 * 6),
        ("t = transpose.int(x, 1, 2)\n y = bmm(x, t)", 2 * 16 * 8 * 16),
        ("t = transpose.int(x, 1, 2)\n s = bmm(x, t)\n y = baddbmm(s, x, t)", 2 * 16 * 8 * 16),
        ("y = einsum('bnc,cd->bnd', [x, m])", 2 * 16 * 8 * 6),
        ("y = einsum('...c,cd->...d', [x, m])", 2 * 16 * 8 * 6),
        ("y = einsum('b n c, b m c -> b n m', [x, x])", 2 * 16 * 16 * 8),
        ("y = scaled_dot_product_attention(x, x, x)", 2 * 16 * 16 * (8 + 8)),
        ("y = conv2d(image, k3, None, [1, 1], [1, 1])", 2 * 16 * 16 * 16 * 8 * 9),
        ("y = conv2d(image, k3, None, [2, 2], [1, 1])", 2 * 16 * 8 * 8 * 8 * 9),
        ("y = conv2d(image, depth, None, [1, 1], [1, 1], [1, 1], 8)", 2 * 8 * 16 * 16 * 9),
        ("y = conv2d(image, grouped, None, [1, 1], [1, 1], [1, 1], 2)", 2 * 16 * 16 * 16 * 4 * 9),
        ("y = conv_transpose2d.input(image, up, None, [2, 2])", 2 * 8 * 16 * 16 * 16 * 4),
        ("t = transpose.int(x, 1, 2)\n y = conv1d(t, kernel)", 2 * 16 * 14 * 8 * 3),
        ("y = gelu(x)", 0),
        ("y = softmax.int(x, -1)", 0),
    ],
)
def test_the_cost_of_an_operator_is_that_of_its_formula(line: str, expected: int) -> None:
    assert macs(last(line)) == expected
    assert is_heavy(last(line)) == (expected > 0)


@pytest.mark.parametrize("toy", ["dit", "mmdit", "cross", "hand_written", "unet"])
def test_the_cost_of_a_toy_is_what_torch_counts(toy: str, captured: Callable[[str], Program]) -> None:
    definition: Toy = {**TOYS, **REFUSED}[toy]
    counted = sum(macs(node) for node in captured(toy).graph.nodes)
    assert counted == pytest.approx(counted_by_torch(definition.model(), call(definition)), rel=0.01)


# Sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_told_by_their_example() -> None:
    node = last("t = view(x, [-1, 2, 8])\n y = cat([t, t], 0)")
    assert shape_of(node) == (2 * 2 * 16 // 2, 2, 8)
    assert [size_hint(size) for size in (3, *value_of(node).shape)] == [3, 32, 2, 8]


def test_sizes_follow_the_callers_tensors_where_others_were_captured() -> None:
    found = program(INPUTS + "    y = matmul(x, m)\n    z = cat([x, x], 0)\n    return y, z")
    by_name = {node.name: node for node in found.graph.nodes}
    note_example_sizes(value_of(by_name["x"]).shape, [1, 10, 8])
    assert shape_of(by_name["y"]) == (1, 10, 6)
    assert shape_of(by_name["z"]) == (2, 10, 8)
    assert macs(by_name["y"]) == 10 * 8 * 6


def test_a_size_that_depends_on_values_is_unknown_until_it_was_seen() -> None:
    size = ShapeEnv().create_unbacked_symint()
    assert (example_size(size), size_hint(size), example_size(2 * size)) == (None, 1, None)
    note_example_sizes([size], [8])
    assert (example_size(size), size_hint(2 * size)) == (8, 16)


def test_what_is_no_tensor_has_no_shape() -> None:
    assert shape_of(last("y = sym_size.int(x, 0)")) is None


# Names ------------------------------------------------------------------------------------------------------------


def test_an_operator_goes_by_its_name_without_overload() -> None:
    node = last("y = add.Tensor(x, x)")
    assert operator_name(node) == "add"
    assert operator_name(node.args[0]) == ""
    assert operator_name(last("h = chunk(x, 2, -1)\n y = h[1]")) == "getitem"


def test_origins_go_back_through_casts_and_views() -> None:
    node = last(
        "c = cos(x)\n t = transpose.int(c, 1, 2)\n h = _to_copy(t, dtype=float16)\n y = slice.Tensor(h, 1, 2, 4)"
    )
    assert [origin.name for origin in origins(node)] == ["y", "h", "t", "c"]


@pytest.mark.parametrize(
    ("line", "dense"),
    [
        ("y = conv2d(image, k3)", True),
        ("y = conv2d(image, grouped, None, [1, 1], [0, 0], [1, 1], 2)", True),
        ("y = conv2d(image, k1)", False),  # pointwise: an MLP over the tokens of an image
        ("y = conv2d(image, depth, None, [1, 1], [0, 0], [1, 1], 8)", False),
        ("y = linear(x, w)", False),
    ],
)
def test_a_dense_convolution_mixes_channels_over_positions(line: str, dense: bool) -> None:
    assert is_dense_convolution(last(line)) == dense


@pytest.mark.parametrize(
    ("line", "random"),
    [
        ("y = scaled_dot_product_attention(x, x, x)", False),
        ("y = scaled_dot_product_attention(x, x, x, None, 0.1)", True),
        ("y = dropout(x, 0.1, False)", False),
        ("y = dropout(x, 0.1, True)", True),
        ("y = randn_like(x)", True),
        ("y = linear(x, w)", False),
    ],
)
def test_what_drops_nothing_is_not_random(line: str, random: bool) -> None:
    assert is_random(last(line)) == random


N, M = sympy.symbols("n m", integer=True, positive=True)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (TruncToInt(FloatTrueDiv(ToFloat(4 * N), sympy.Float(4.0))), "n"),
        (FloorToInt(FloatTrueDiv(IntTrueDiv(12 * N, 3), sympy.Float(2.0))), "2*n"),
        (TruncToInt(IntTrueDiv(N, 3)), "floor(n/3)"),
        (TruncToInt(FloatTrueDiv(ToFloat(4 * N), sympy.Float(1.5))), "floor(2.66666666666667*n)"),
        (IntTrueDiv(N * M, 3 * N), "m/3"),
        (IntTrueDiv(FloatTrueDiv(ToFloat(N), sympy.Float(3.0)), N), "IntTrueDiv(FloatTrueDiv(ToFloat(n), 3.0), n)"),
        (N * M, "m*n"),
    ],
)
def test_a_size_that_is_divided_without_rest_is_read_exactly(size: sympy.Expr, text: str) -> None:
    assert str(exact(size)) == text
