from __future__ import annotations

import pytest

from lazy_compile.ir.program import Role
from lazy_compile.passes.hoist_step_invariants import HoistStepInvariants
from support.graph_text import after, calls, program, text

INPUTS = """
    x: f32[B, N, 8]
    words: f32[B, M, 8]
    w: param f32[8, 8]
"""
TEXT_STAYS = HoistStepInvariants(frozenset({"words"}))


def parts(body: str) -> tuple[str, str]:
    """The graph behind the pass, and its prologue."""
    result = TEXT_STAYS(program(INPUTS + body)).program
    assert result.prologue is not None
    return text(result.graph), text(result.prologue.graph)


def test_a_product_of_what_stays_is_handed_over_modified_true() -> None:
    body = "k = linear(words, w)\n q = linear(x, w)\n t = transpose.int(k, 1, 2)\n y = matmul(q, t)\n return y"
    assert parts(body) == (
        "q = linear(x, w)\nt = transpose.int(invariant_0, 1, 2)\ny = matmul(q, t)\nreturn y",
        "k = linear(words, w)\nreturn k",
    )


def test_what_comes_behind_the_weights_and_inputs_is_named_and_has_a_role() -> None:
    body = "k = linear(words, w)\n q = linear(x, w)\n t = transpose.int(k, 1, 2)\n y = matmul(q, t)\n return y"
    result = TEXT_STAYS(program(INPUTS + body)).program
    assert [item.role for item in result.inputs] == [Role.USER, Role.USER, Role.PARAMETER, Role.INVARIANT]
    assert result.placeholders[-1].name == result.inputs[-1].name == "invariant_0"


def test_what_follows_from_a_result_without_a_product_stays() -> None:
    """The first text stream of a joint attention is normed: its entry must still depend on its skip connection."""
    body = """
        k = linear(words, w)
        n = layer_norm(k, [8])
        s = sum.dim_IntList(x, [1], True)
        a = mul.Tensor(n, s)
        y = add.Tensor(k, a)
        return y
    """
    assert parts(body) == (
        "n = layer_norm(invariant_0, [8])\ns = sum.dim_IntList(x, [1], True)\na = mul.Tensor(n, s)\n"
        "y = add.Tensor(invariant_0, a)\nreturn y",
        "k = linear(words, w)\nreturn k",
    )


def test_a_second_product_behind_a_result_is_one_more() -> None:
    body = "e = linear(words, w)\n k = linear(e, w)\n a = add.Tensor(x, e)\n b = add.Tensor(a, k)\n return b"
    body = body.replace("x, e", "e, s").replace("e = linear", "s = sum.dim_IntList(x, [1], True)\n e = linear", 1)
    main, prologue = parts(body)
    assert prologue == "e = linear(words, w)\nk = linear(e, w)\nreturn e, k"
    assert "linear" not in main


@pytest.mark.parametrize(
    "body",
    [
        "k = linear(x, w)\n y = cos(k)\n return y",  # changes
        "k = cos(words)\n s = sum.dim_IntList(x, [1], True)\n y = mul.Tensor(k, s)\n return y",  # no product
        "k = mm(w, w)\n y = linear(x, k)\n return y",  # weights alone
        "k = linear(words, w)\n y = cos(x)\n return y, k",  # the caller receives it
        "r = dropout(words, 0.5, True)\n k = linear(r, w)\n s = sum.dim_IntList(x, [1], True)\n y = mul.Tensor(k, s)\n "
        "return y",
    ],
    ids=["varying", "cheap", "weights", "returned", "random"],
)
def test_everything_else_stays_modified_false(body: str) -> None:
    assert after(TEXT_STAYS, INPUTS + body) == (calls(body), False)


def test_without_names_nothing_is_hoisted_modified_false() -> None:
    body = "k = linear(words, w)\n s = sum.dim_IntList(x, [1], True)\n y = mul.Tensor(k, s)\n return y"
    assert after(HoistStepInvariants(), INPUTS + body) == (calls(body), False)


def test_a_size_of_what_changes_may_be_read() -> None:
    body = """
        n = sym_size.int(x, 1)
        k = linear(words, w)
        m = mean.dim(k, [1], True)
        e = expand(m, [-1, n, 8])
        y = mul.Tensor(e, x)
        return y
    """
    main, prologue = parts(body)
    assert prologue == "k = linear(words, w)\nm = mean.dim(k, [1], True)\nreturn m"
    assert main == "n = sym_size.int(x, 1)\ne = expand(invariant_0, [-1, n, 8])\ny = mul.Tensor(e, x)\nreturn y"


def test_a_size_of_a_result_that_changes_is_no_reason_to_compute_it_twice_modified_false() -> None:
    body = """
        h = linear(x, w)
        n = sym_size.int(h, 1)
        k = linear(words, w)
        m = mean.dim(k, [1], True)
        r = repeat(m, [1, n, 1])
        f = linear(r, w)
        y = mul.Tensor(f, h)
        return y
    """
    main, prologue = parts(body)
    assert "f = linear(r, w)" in main
    assert "h" not in prologue.split()
