from __future__ import annotations

import pytest

from lazy_compile.passes.merge_repeats import MergeRepeats
from support.graph_text import after, calls

INPUTS = """
    x: f32[B, N, 8]
    w: param f32[8, 8]
"""


@pytest.mark.parametrize(
    "call",
    ["neg(x)", "_to_copy(x, dtype=float16)", "mul.Tensor(x, 2.0)", "sum.dim_IntList(x, [1], True)", "linear(x, w)"],
)
def test_a_call_that_is_repeated_is_made_once_modified_true(call: str) -> None:
    source = f"{INPUTS}    a = {call}\n    b = {call}\n    c = cos(a)\n    d = sin(b)\n    return c, d"
    assert after(MergeRepeats(), source) == (f"a = {call}\nc = cos(a)\nd = sin(a)\nreturn c, d", True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("neg(x)", "cos(x)"),
        ("mul.Tensor(x, 2)", "mul.Tensor(x, 2.0)"),  # the one keeps an integer type, the other does not
        ("add.Tensor(x, y)", "add.Tensor(y, x)"),
        ("add.Tensor(x, y)", "add.Tensor(x, y, alpha=2)"),
        ("sum.dim_IntList(x, [1], True)", "sum.dim_IntList(x, [1], False)"),
        ("dropout(x, 0.5, True)", "dropout(x, 0.5, True)"),
        ("rand_like(x)", "rand_like(x)"),
    ],
)
def test_calls_that_differ_stay_modified_false(one: str, other: str) -> None:
    source = (
        f"{INPUTS}    y: f32[B, N, 8]\n    a = {one}\n    b = {other}\n    c = cos(a)\n    d = sin(b)\n    return c, d"
    )
    assert after(MergeRepeats(), source) == (calls(source), False)


def test_a_chain_that_is_repeated_is_followed_to_its_end_modified_true() -> None:
    chain = "    a = neg(x)\n    b = exp(a)\n    c = neg(x)\n    d = exp(c)\n    e = add.Tensor(b, d)"
    merged = "a = neg(x)\nb = exp(a)\ne = add.Tensor(b, b)\nreturn e"
    assert after(MergeRepeats(), f"{INPUTS}{chain}\n    return e") == (merged, True)


def test_results_that_the_caller_receives_stay_apart_modified_false() -> None:
    source = f"{INPUTS}    a = neg(x)\n    b = neg(x)\n    v = view(b, [-1, 8])\n    return a, v"
    assert after(MergeRepeats(), source) == (calls(source), False)
