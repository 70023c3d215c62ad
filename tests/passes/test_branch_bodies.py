"""Where a body begins and ends, on graphs whose residual adds stand close together or inside one another."""

from __future__ import annotations

import pytest

from lazy_compile.ir.program import Program
from support.branch_texts import bodies, discover

INPUTS = """
    x: f32[B, N, 8]
    s: f32[B, M, 8]
    c: f32[B, 1, 8]
    table: param f32[16, 8]
    w1: param f32[8, 8]
    w2: param f32[8, 8]
    w3: param f32[8, 8]
    w4: param f32[8, 8]
    up: param f32[32, 8]
    down: param f32[8, 32]
    kernel: param f32[8, 1, 3]
    dense: param f32[8, 8, 3]
"""
ATTENTION = "q = linear(x, w1)\n k = linear(x, w2)\n a = scaled_dot_product_attention(q, k, k)\n d = linear(a, w3)\n"


def found(body: str) -> Program:
    return discover(body, INPUTS)


def branches(body: str) -> list[tuple[str, str]]:
    """Kind and tagged nodes of every branch."""
    result = found(body)
    return [(branch.kind.value, nodes) for branch, nodes in zip(result.branches, bodies(result), strict=True)]


def test_a_size_may_be_a_number_on_one_side_and_a_symbol_on_the_other() -> None:
    body = "p = linear(table, w1)\n u = linear(x, up)\n g = gelu(u)\n d = linear(g, down)\n r = add.Tensor(d, p)\n"
    result = found(body + " y = add.Tensor(x, r)\n return y")
    add = next(node for node in result.graph.nodes if node.name == "y")
    sizes = [str(argument.meta["val"].shape[1]) for argument in add.args]
    assert "16" in sizes  # a table of positions has a fixed length
    assert len(result.branches) == 1


def test_an_attention_that_reads_what_another_attended_is_a_branch_of_its_own() -> None:
    body = ATTENTION + (
        "h = add.Tensor(x, d)\n k2 = linear(s, w4)\n q2 = linear(d, w2)\n"
        "a2 = scaled_dot_product_attention(q2, k2, k2)\n y = add.Tensor(h, a2)\n return y"
    )
    assert branches(body) == [("self_attention", "q k a d"), ("cross_attention", "k2 q2 a2")]


def test_a_smaller_branch_inside_another_is_part_of_it() -> None:
    body = (
        "u = linear(x, up)\n g = gelu(u)\n inner = linear(g, kernel_up)\n h = add.Tensor(g, inner)\n"
        "d = linear(h, down)\n y = add.Tensor(x, d)\n return y"
    )
    body = "kernel_up: param f32[32, 32]\n" + body
    assert branches(body) == [("mlp", "u g inner h d")]
    (refusal,) = found(body).refusals
    assert (refusal.node, refusal.reason) == ("h", "part of a larger branch, that of y")


def test_a_gate_of_the_output_that_reads_the_same_tokens_is_in_the_body() -> None:
    body = ATTENTION + "g = linear(x, w4)\n s1 = sigmoid(g)\n m = mul.Tensor(s1, d)\n"
    assert branches(body + "y = add.Tensor(x, m)\n return y") == [("self_attention", "q k a d g s1 m")]


def test_a_gate_of_the_output_that_reads_the_timestep_stays_fresh() -> None:
    body = ATTENTION + "g = mul.Tensor(c, d)\n y = add.Tensor(x, g)\n return y"
    assert branches(body) == [("self_attention", "q k a d")]


def test_experts_that_are_added_into_zeros_have_one_output() -> None:
    body = (
        "score = linear(x, w4)\n e = linear(x, w1)\n n = sym_size.int(x, 1)\n b = sym_size.int(x, 0)\n"
        "z = zeros([b, n, 8])\n part = mul.Tensor(score, e)\n sum = add.Tensor(z, part)\n"
        "y = add.Tensor(x, sum)\n return y"
    )
    ((kind, nodes),) = branches(body)
    assert (kind, nodes.split()[-1]) == ("mlp", "part")


def test_a_branch_that_depends_on_nothing_but_the_shape_of_the_stream_is_none() -> None:
    body = "z = zeros_like(x)\n u = linear(z, up)\n g = gelu(u)\n d = linear(g, down)\n y = add.Tensor(x, d)\n return y"
    result = found(body)
    assert (result.branches, result.refusals) == ((), ())


def test_one_dense_convolution_among_pointwise_ones_leaves_an_mlp_an_mlp() -> None:
    turned = "t = transpose.int(x, 1, 2)\n"
    wide = "in1: param f32[8, 8, 1]\nout1: param f32[8, 8, 1]\n"
    pointwise = "u = conv1d(t, in1)\n g = gelu(u)\n m = conv1d(g, dense, None, [1], [1])\n d = conv1d(m, out1)\n"
    body = wide + turned + pointwise + "y = add.Tensor(t, d)\n return y"
    assert branches(body) == [("mlp", "u g m d")]


def test_a_bias_of_attention_made_from_another_stream_does_not_make_it_joint() -> None:
    body = (
        "pair = linear(s, w4)\n bias = mean.dim(pair, [1, 2], True)\n"
        "q = linear(x, w1)\n a = scaled_dot_product_attention(q, q, q, bias)\n y = add.Tensor(x, a)\n return y"
    )
    assert [kind for kind, _ in branches(body)] == ["self_attention"]


def test_keys_that_another_branch_alone_reads_are_not_taken_for_its_own_by_a_branch_around_it() -> None:
    """Latent tokens read the stream, and the stream reads them: two branches, one after the other."""
    body = (
        "k = linear(x, w1)\n q = linear(s, w2)\n a = scaled_dot_product_attention(q, k, k)\n t = add.Tensor(s, a)\n"
        "k2 = linear(t, w3)\n q2 = linear(x, w4)\n b = scaled_dot_product_attention(q2, k2, k2)\n"
        "y = add.Tensor(x, b)\n return y, t"
    )
    assert [nodes for _, nodes in branches(body)] == ["k q a", "k2 q2 b"]


def test_weights_of_chosen_experts_do_not_make_an_attention() -> None:
    body = (
        "experts: param f32[3, 8, 8]\n score = linear(x, w1)\n best = argmax(score, -1)\n"
        "own = index.Tensor(experts, [best])\n e = einsum('bnd,bnde->bne', [x, own])\n"
        "y = add.Tensor(x, e)\n return y"
    )
    assert [kind for kind, _ in branches(body)] == ["mlp"]


def test_a_running_sum_over_the_tokens_is_no_mlp() -> None:
    body = "u = linear(x, up)\n g = silu(u)\n r = cumsum(g, 1)\n d = linear(r, down)\n y = add.Tensor(x, d)\n return y"
    assert branches(body) == [("conv", "u g r d")]


def test_a_position_encoding_by_a_depthwise_convolution_is_a_convolution() -> None:
    body = (
        "t = transpose.int(x, 1, 2)\n p = conv1d(t, kernel, None, [1], [1], [1], 8)\n y = add.Tensor(t, p)\n return y"
    )
    assert branches(body) == []
    assert [refusal.reason for refusal in found(body).refusals] == [
        "convolution block; gate it with conv_branches=True"
    ]


def test_a_convolution_with_a_skip_inside_an_attention_is_part_of_it() -> None:
    body = (
        "t = transpose.int(x, 1, 2)\n p = conv1d(t, kernel, None, [1], [1], [1], 8)\n m = add.Tensor(t, p)\n"
        "z = transpose.int(m, 1, 2)\n q = linear(z, w1)\n a = scaled_dot_product_attention(q, q, q)\n"
        "y = add.Tensor(x, a)\n return y"
    )
    assert branches(body) == [("self_attention", "p m z q a")]


NO_BRANCH = {
    "a chain without a skip": "u = linear(x, up)\n g = gelu(u)\n y = linear(g, down)\n return y",
    "two maps of one stream": "p = linear(x, w1)\n r = linear(x, w2)\n y = add.Tensor(p, r)\n return y",
    "a sum with another stream": "p = slice.Tensor(s, 1, 0, 4)\n r = slice.Tensor(x, 1, 0, 4)\n q = linear(p, w1)\n"
    "y = add.Tensor(r, q)\n return y",
    "a product with the stream": "u = linear(x, w1)\n g = sigmoid(u)\n y = mul.Tensor(x, g)\n return y",
    "a concatenation with the stream": "u = linear(x, w1)\n y = cat([x, u], -1)\n return y",
}


@pytest.mark.parametrize("body", NO_BRANCH.values(), ids=NO_BRANCH)
def test_what_has_no_residual_add_has_no_branch(body: str) -> None:
    assert branches(body) == []
