from __future__ import annotations

from collections.abc import Callable

import pytest

from lazy_compile.ir.program import Program
from lazy_compile.passes.canonicalize import Canonicalize
from lazy_compile.passes.discover_branches import DiscoverBranches
from support.branch_texts import ATTENTION, INPUTS, MLP, bodies, discover
from support.graph_text import after, program, text
from support.toy_models import REFUSED, TOYS

Captured = Callable[[str], Program]


def kinds(found: Program) -> list[str]:
    return [branch.kind.value for branch in found.branches]


# Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_the_branches_of_a_toy_are_those_that_its_author_wrote(toy: str, captured: Captured) -> None:
    found = DiscoverBranches()(Canonicalize()(captured(toy)).program).program
    assert tuple((branch.name, branch.kind.value) for branch in found.branches) == TOYS[toy].branches
    assert [branch.index for branch in found.branches] == list(range(len(found.branches)))
    for branch in found.branches:
        assert branch.macs > 0
        assert branch.gate_features == 32 * len(branch.entries)
        assert branch.row_separable == (toy != "windowed" or branch.name == "mlp"), branch.why_not_separable


def test_the_text_stream_of_a_joint_attention_is_an_entry_and_an_output(captured: Captured) -> None:
    first, *_, last, _ = DiscoverBranches()(Canonicalize()(captured("mmdit")).program).program.branches
    assert [entry.shape for entry in first.entries] == [(2, 5, 32), (2, 16, 32)]
    assert sorted(output.shape for output in first.outputs) == [(2, 5, 32), (2, 16, 32)]
    assert len(last.outputs) == 1  # its text is not read any more


def test_convolution_blocks_are_refused_and_named(captured: Captured) -> None:
    found = DiscoverBranches()(Canonicalize()(captured("unet")).program).program
    assert found.branches == ()
    assert [(refusal.path, refusal.reason) for refusal in found.refusals] == [
        ("outer", "convolution block; gate it with conv_branches=True"),
        ("inner", "convolution block; gate it with conv_branches=True"),
    ]


def test_convolution_blocks_are_found_where_they_are_wanted(captured: Captured) -> None:
    found = DiscoverBranches(conv_branches=True)(Canonicalize()(captured("unet")).program).program
    assert tuple((branch.name, branch.kind.value) for branch in found.branches) == REFUSED["unet"].branches
    assert found.refusals == ()
    for branch in found.branches:
        assert [entry.channel_axis for entry in branch.entries] == [1]
        assert branch.gate_features == 16


def test_a_model_without_skip_connections_has_no_branch_and_no_refusal(captured: Captured) -> None:
    found = DiscoverBranches()(Canonicalize()(captured("plain")).program).program
    assert (found.branches, found.refusals) == ((), ())


def test_a_skip_around_whole_blocks_is_refused_as_a_container(captured: Captured) -> None:
    found = DiscoverBranches()(Canonicalize()(captured("container")).program).program
    (refusal,) = found.refusals
    assert refusal.reason.startswith("container: 2 residual adds lie between its operators")


# The residual add -------------------------------------------------------------------------------------------------


def test_a_residual_mlp_is_a_branch_modified_true() -> None:
    source = program(INPUTS + MLP + "    y = add.Tensor(x, d)\n    return y")
    result = DiscoverBranches()(source)
    assert result.modified
    assert text(result.program.graph) == text(source.graph)
    assert bodies(result.program) == ["u a d"]
    assert bodies(source) == []


def test_nothing_to_find_modified_false() -> None:
    assert after(DiscoverBranches(), INPUTS + MLP + "    return d")[1] is False


def test_a_second_run_modified_false() -> None:
    found = discover(MLP + "    y = add.Tensor(x, d)\n    return y")
    assert not DiscoverBranches()(found).modified


@pytest.mark.parametrize(
    "add",
    [
        "y = add.Tensor(x, d)",
        "y = add.Tensor(d, x)",
        "y = add.Tensor(x, d, alpha=0.5)",
        "y = sub.Tensor(x, d)",
        "y = lerp.Scalar(x, d, 0.3)",
        "y = addcmul(x, d, c)",
        "half = _to_copy(d, dtype=float16)\n    same = _to_copy(x, dtype=float16)\n    y = add.Tensor(same, half)",
        "same = type_as(x, d)\n    y = add.Tensor(same, d)",
        "same = dropout(x, 0.1, False)\n    y = add.Tensor(same, d)",
        "part = slice.Tensor(x, 1, 1, 9)\n    value = slice.Tensor(d, 1, 1, 9)\n    y = add.Tensor(part, value)",
        "turned = transpose.int(x, 1, 2)\n    value = transpose.int(d, 1, 2)\n    y = add.Tensor(turned, value)",
        "scaled = mul.Tensor(x, 0.7)\n    y = add.Tensor(scaled, d)",
        "scaled = div.Tensor(x, 2.0)\n    value = mul.Tensor(d, 0.5)\n    y = add.Tensor(scaled, value)",
        "g = mul.Tensor(d, c)\n    y = add.Tensor(x, g)",  # the gate of adaLN
        "post = layer_norm(d, [8])\n    y = add.Tensor(x, post)",  # a sandwich norm
    ],
)
def test_every_spelling_of_a_residual_add_is_seen(add: str) -> None:
    found = discover(f"{MLP}    {add}\n    return y")
    assert bodies(found) == ["u a d"]
    assert kinds(found) == ["mlp"]


@pytest.mark.parametrize(
    "body",
    [
        "p = linear(x, q_in)\n    r = linear(x, k_in)\n    y = add.Tensor(p, r)",  # neither is an ancestor
        "p = linear(x, q_in)\n    y = add.Tensor(p, c)",  # a shift of adaLN, broadcast
        "t = tanh(x)\n    y = add.Tensor(x, t)",  # nothing heavy between
        "p = linear(x, q_in)\n    y = add.Tensor(p, s1)",
        # a residual embedding of the condition, not of tokens
        "p = linear(c1, q_in)\n    e = add.Tensor(c1, p)\n    y = unsqueeze(e, 1)",
    ],
)
def test_what_is_no_residual_branch_is_left_alone(body: str) -> None:
    inputs = f"{INPUTS}    s1: f32[B, N, 8]\n    c1: f32[B, 8]\n"
    found = discover(f"    {body}\n    return y", inputs)
    assert (found.branches, found.refusals) == ((), ())


def test_packed_tokens_of_rank_two_are_a_stream() -> None:
    inputs = "    x: f32[B, N, 8]\n    w: param f32[8, 8]\n"
    body = "t = view(x, [-1, 8])\n p = linear(t, w)\n u = add.Tensor(t, p)\n y = view(u, [{}, -1, 8])\n return y"
    assert bodies(discover("n = sym_size.int(x, 0)\n" + body.format("n"), inputs)) == ["p"]
    fixed = discover(body.format(2), inputs.replace("B", "2"))
    assert bodies(fixed) == ["p"]
    vectors = "v = select.int(x, 1, 0)\n p = linear(v, w)\n e = add.Tensor(v, p)\n y = unsqueeze(e, 1)\n return y"
    assert bodies(discover(vectors, inputs)) == bodies(discover(vectors, inputs.replace("B", "2"))) == []


def test_vectors_are_a_stream_where_the_output_is_one_and_there_is_no_other() -> None:
    inputs = "    x: f32[B, N, 8]\n    c: f32[B, 8]\n    w: param f32[8, 8]\n"
    vectors = "p = linear(c, w)\n e = add.Tensor(c, p)\n"
    assert bodies(discover(vectors + " return e", inputs)) == ["p"]
    tokens = " q = linear(x, w)\n y = add.Tensor(x, q)\n m = mean.dim(y, [1])\n z = add.Tensor(e, m)\n return z"
    assert bodies(discover(vectors + tokens, inputs)) == ["q"]


def test_an_axis_that_attention_runs_along_holds_tokens_and_no_rows() -> None:
    inputs = "    x: f32[N, 8]\n    w: param f32[8, 8]\n"
    body = (
        "q = linear(x, w)\n h = view(q, [1, 1, -1, 8])\n a = scaled_dot_product_attention(h, h, h)\n"
        "o = view(a, [-1, 8])\n d = linear(o, w)\n y = add.Tensor(x, d)\n return y"
    )
    found = discover(body, inputs)
    assert bodies(found) == ["q h a o d"]
    assert found.branches[0].why_not_separable == "the batch size is fixed in this graph"


def test_two_branches_that_read_the_same_input_stay_two() -> None:
    found = discover(
        ATTENTION.replace("d =", "attended =")
        + "    h = add.Tensor(x, attended)\n"
        + "    m = layer_norm(h, [8])\n    u = linear(m, up)\n    g = gelu(u)\n    d = linear(g, down)\n"
        + "    y = add.Tensor(x, d)\n    return y"  # added to the input of the block, not to h
    )
    assert bodies(found) == ["q k v a attended", "u g d"]
    assert kinds(found) == ["self_attention", "mlp"]


def test_adds_one_after_another_give_one_branch_each() -> None:
    found = discover(
        ATTENTION.replace("d =", "attended =")
        + "    u = linear(z, up)\n    g = gelu(u)\n    d = linear(g, down)\n"
        + "    h = add.Tensor(x, attended)\n    y = add.Tensor(h, d)\n    return y"
    )
    assert bodies(found) == ["q k v a attended", "u g d"]


def test_a_sum_of_attention_and_mlp_is_one_parallel_branch() -> None:
    found = discover(
        ATTENTION.replace("d =", "attended =")
        + "    u = linear(z, up)\n    g = gelu(u)\n    d = linear(g, down)\n"
        + "    both = add.Tensor(attended, d)\n    y = add.Tensor(x, both)\n    return y"
    )
    assert bodies(found) == ["q k v a attended u g d both"]
    assert kinds(found) == ["parallel"]


def test_an_add_in_the_hull_makes_a_container() -> None:
    found = discover(
        "    first = linear(x, q_in)\n    u = linear(first, up)\n    p = linear(u, down)\n"
        "    h = add.Tensor(first, p)\n    last = linear(h, v_in)\n    y = add.Tensor(x, last)\n    return y"
    )
    assert bodies(found) == ["u p"]
    (refusal,) = found.refusals
    assert (refusal.node, refusal.reason) == ("y", "container: 1 residual adds lie between its operators (h, ...)")


FEED_EACH_OTHER = """
    p = linear(x, q_in)
    u = linear(s, k_in)
    p_mean = mean.dim(p, [1], True)
    u_mean = mean.dim(u, [1], True)
    {between}
    p_in = mul.Tensor(p, u_mean)
    u_in = mul.Tensor(u, {read})
    p2 = linear(p_in, v_in)
    u2 = linear(u_in, o_in)
    y = add.Tensor(x, p2)
    t = add.Tensor(s, u2)
    return y, t"""


def test_bodies_that_feed_each_other_are_one() -> None:
    found = discover(FEED_EACH_OTHER.format(between="", read="p_mean"))
    assert bodies(found) == ["p u p_mean u_mean p_in u_in p2 u2"]
    assert [refusal.reason for refusal in found.refusals] == ["part of a larger branch, that of y"]


def test_bodies_that_feed_each_other_through_a_third_are_refused() -> None:
    between = "r = linear(p_mean, q_in)\n    third = add.Tensor(p_mean, r)"
    found = discover(FEED_EACH_OTHER.format(between=between, read="third"))
    assert bodies(found) == ["p p_in p2", "r"]
    assert [refusal.reason for refusal in found.refusals] == [
        "entangled: it both feeds and reads the body of another branch"
    ]


# The body ---------------------------------------------------------------------------------------------------------


def test_keys_and_values_of_a_text_belong_to_the_body() -> None:
    found = discover(
        "    k = linear(s, k_in)\n    v = linear(s, v_in)\n    z = mul.Tensor(x, c)\n    q = linear(z, q_in)\n"
        "    a = scaled_dot_product_attention(q, k, v)\n    d = linear(a, o_in)\n"
        "    y = add.Tensor(x, d)\n    return y"
    )
    assert bodies(found) == ["k v q a d"]
    assert kinds(found) == ["cross_attention"]
    (branch,) = found.branches
    assert [entry.name for entry in branch.entries] == ["z"]


def test_what_is_only_as_large_as_the_stream_is_no_entry_and_belongs_to_the_body() -> None:
    found = discover(
        "    n = sym_size.int(x, 0)\n    t = expand(c, [n, 1, 8])\n    k = linear(t, k_in)\n    z = mul.Tensor(x, x)\n"
        "    q = linear(z, q_in)\n    m = sym_size.int(q, 1)\n    bias = ones([n, m, 1])\n"
        "    a = scaled_dot_product_attention(q, k, k, bias)\n    d = linear(a, o_in)\n"
        "    y = add.Tensor(x, d)\n    return y"
    )
    assert kinds(found) == ["cross_attention"]
    (branch,) = found.branches
    assert [entry.name for entry in branch.entries] == ["z"]
    assert "k" in bodies(found)[0].split()


def test_a_text_that_others_read_too_stays_outside() -> None:
    found = discover(
        "    t = linear(s, o_in)\n    k = linear(t, k_in)\n    q = linear(x, q_in)\n"
        "    a = scaled_dot_product_attention(q, k, k)\n    y = add.Tensor(x, a)\n    return y, t"
    )
    assert bodies(found) == ["k q a"]


def test_branches_are_numbered_as_they_run_wherever_their_text_is_read() -> None:
    found = discover(
        "    k2 = linear(s, k_in)\n    q2 = linear(x, up)\n    a2 = linear(q2, down)\n    h = add.Tensor(x, a2)\n"
        "    q = linear(h, q_in)\n    a = scaled_dot_product_attention(q, k2, k2)\n"
        "    y = add.Tensor(h, a)\n    return y"
    )
    assert bodies(found) == ["q2 a2", "k2 q a"]


def test_streams_that_meet_in_one_attention_are_one_branch() -> None:
    found = discover(
        "    q = linear(x, q_in)\n    k = linear(s, k_in)\n    both = cat([q, k], 1)\n"
        "    a = scaled_dot_product_attention(both, both, both)\n"
        "    n = sym_size.int(x, 1)\n    first = slice.Tensor(a, 1, 0, n)\n"
        "    second = slice.Tensor(a, 1, n, 9223372036854775807)\n"
        "    x2 = linear(first, v_in)\n    s2 = linear(second, o_in)\n"
        "    y = add.Tensor(x, x2)\n    t = add.Tensor(s, s2)\n    return y, t"
    )
    assert bodies(found) == ["q k both a first second x2 s2"]
    assert kinds(found) == ["joint_attention"]
    (branch,) = found.branches
    assert [entry.name for entry in branch.entries] == ["x", "s"]
    assert [output.name for output in branch.outputs] == ["x2", "s2"]
    assert branch.gate_features == 16


def test_what_is_used_outside_the_body_is_an_output() -> None:
    found = discover(MLP + "    extra = neg(a)\n    y = add.Tensor(x, d)\n    return y, extra")
    (branch,) = found.branches
    assert [output.name for output in branch.outputs] == ["a", "d"]
    assert [(output.shape, output.dtype, output.bytes) for output in branch.outputs] == [
        ((2, 16, 32), "float32", 2 * 16 * 32 * 4),
        ((2, 16, 8), "float32", 2 * 16 * 8 * 4),
    ]
    assert branch.macs == 2 * 16 * (8 * 32 + 32 * 8)


def test_the_channels_of_an_entry_are_the_axis_that_the_model_fixes() -> None:
    found = discover(
        "    kt = transpose.int(x, 1, 2)\n    p = matmul(kt, x)\n    d = matmul(x, p)\n"
        "    y = add.Tensor(x, d)\n    return y"
    )
    (branch,) = found.branches
    assert [(entry.name, entry.shape, entry.channel_axis) for entry in branch.entries] == [
        ("kt", (2, 8, 16), -2),
        ("x", (2, 16, 8), -1),
    ]
    assert branch.gate_features == 16  # at any number of tokens


# Its kind ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (ATTENTION, "self_attention"),
        (
            "    q = linear(x, q_in)\n    kt = transpose.int(q, 1, 2)\n    p = matmul(q, kt)\n"
            "    w = softmax.int(p, -1)\n    d = matmul(w, q)\n",
            "self_attention",
        ),
        (
            "    q = relu(x)\n    kt = transpose.int(x, 1, 2)\n    p = matmul(kt, x)\n    d = matmul(q, p)\n",
            "self_attention",  # linear attention: no softmax
        ),
        (MLP, "mlp"),
        (
            "    u = linear(x, up)\n    s1 = silu(u)\n    v = linear(x, up)\n    p = mul.Tensor(s1, v)\n"
            "    d = linear(p, down)\n",
            "mlp",
        ),
        (
            "    q = linear(x, q_in)\n    a = scaled_dot_product_attention(q, q, q)\n    g = linear(x, k_in)\n"
            "    s1 = sigmoid(g)\n    p = mul.Tensor(a, s1)\n    d = linear(p, o_in)\n",
            "self_attention",  # the sigmoid gates the attention: no MLP beside it
        ),
        (
            "    u = linear(x, up)\n    g = gelu(u)\n    m = linear(g, down)\n    q = linear(x, q_in)\n"
            "    a = scaled_dot_product_attention(q, q, q)\n    both = cat([a, m], 1)\n    n = sym_size.int(x, 1)\n"
            "    half = slice.Tensor(both, 1, 0, n)\n    d = linear(half, o_in)\n",
            "parallel",
        ),
    ],
)
def test_the_kind_is_read_from_the_operators(body: str, kind: str) -> None:
    assert kinds(discover(f"{body}    y = add.Tensor(x, d)\n    return y")) == [kind]


def test_a_convolution_block_keeps_its_kind_beside_a_time_embedding() -> None:
    body = (
        "    first = conv2d(image, kernel)\n    padded = constant_pad_nd(first, [1, 1, 1, 1])\n"
        "    t = linear(c, q_in)\n    column = view(t, [-1, 8, 1, 1])\n    timed = add.Tensor(padded, column)\n"
        "    second = conv2d(timed, kernel, None, [1, 1], [1, 1])\n    y = add.Tensor(image, second)\n    return y"
    )
    assert kinds(discover(body, conv_branches=True)) == ["conv"]
    assert discover(body).branches == ()
