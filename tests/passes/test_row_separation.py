"""Which bodies can be computed for a part of the rows, and which take one decision for the whole batch."""

from __future__ import annotations

import pytest

from support.branch_texts import INPUTS, bodies, discover


def with_rows(between: str) -> str:
    """Two linears with ``between`` in the middle, from ``f`` to ``b``."""
    return f"""
        n = sym_size.int(x, 0)
        m = sym_size.int(x, 1)
        z = mul.Tensor(x, c)
        f = linear(z, q_in)
        {between}
        d = linear(b, o_in)
        y = add.Tensor(x, d)
        return y
    """


@pytest.mark.parametrize(
    ("between", "mixer"),
    [
        ("b = flip(f, [0])", "flip (b)"),
        ("b = roll(f, [1])", "roll (b)"),
        ("b = cumsum(f, 0)", "cumsum (b)"),
        ("b = div.Tensor(f, n)", "div (b)"),  # another number of rows, another value
        ("r = mean(f); b = sub.Tensor(f, r)", "mean (r)"),
        ("r = mean.dim(f, [0], True); b = sub.Tensor(f, r)", "mean (r)"),
        ("r = slice.Tensor(f, 0, 0, 1); b = expand_as(r, f)", "slice (r)"),
        ("r = index.Tensor(f, [one]); b = expand_as(r, f)", "index (r)"),
        ("r = einsum('bnc,bnd->cd', [f, f]); b = matmul(f, r)", "einsum (r)"),
        ("t = permute(f, [2, 1, 0]); r = softmax.int(t, 2); b = permute(r, [2, 1, 0])", "softmax (r)"),
        (
            "t = permute(f, [2, 1, 0]); u = permute(f, [2, 0, 1]); k = matmul(t, u); r = mean.dim(k, [0]); "
            "b = matmul(r, f)",
            "matmul (k)",
        ),
        ("r = view(f, [m, n, 8]); k = linear(r, k_in); b = view(k, [n, m, 8])", "view (r)"),  # not transposed
        ("t = transpose.int(f, 0, 1); r = reshape(t, [n, m, 8]); b = linear(r, k_in)", "reshape (r)"),
        ("r = view(f, [-1, 8]); k = softmax.int(r, 0); b = view(k, [n, m, 8])", "softmax (k)"),
        ("r = repeat(f, [2, 1, 1]); b = slice.Tensor(r, 0, 0, n)", "repeat (r)"),
        ("r = inner(f, f); k = mean.dim(r, [2, 3]); u = unsqueeze(k, 2); b = mul.Tensor(f, u)", "inner (r)"),
        ("r = tensordot(k_in, f, [0], [2]); b = permute(r, [1, 2, 0])", "tensordot (r)"),
        ("r = unfold(f, 0, 1, 1); b = squeeze.dim(r, 3)", "unfold (r)"),
        ("r = neg(f); b = index_put(f, [one], r)", "index_put (b)"),
        ("t = transpose.int(f, 0, 1); r = index_put(t, [None, one], t); b = transpose.int(r, 0, 1)", "index_put (r)"),
        ("i = argmax(f, -1); b = index_put(f, [None, i], f)", "index_put (b)"),
        ("r = slice.Tensor(f, 1, 0, 1); t = transpose.int(r, 0, 1); b = index_put(f, [None, one], t)", "index_put (b)"),
        ("r = avg_pool2d(f, [1, 1]); b = relu(r)", "avg_pool2d (r)"),  # of rank 3: the first axis has channels
        (
            "t = transpose.int(f, 0, 1); r = scaled_dot_product_attention(t, t, t); b = transpose.int(r, 0, 1)",
            "scaled_dot_product_attention (r)",
        ),
    ],
)
def test_an_operator_that_works_across_rows_keeps_them_together(between: str, mixer: str) -> None:
    inputs = INPUTS + "    one: param i64[1]\n"
    (branch,) = discover(with_rows(between.replace("; ", "\n")), inputs).branches
    assert branch.why_not_separable == f"{mixer} works across the rows of the batch"
    assert not branch.row_separable


@pytest.mark.parametrize(
    "between",
    [
        "b = flip(f, [1])",
        "b = cumsum(f, 1)",
        "i = arange(n); j = view(i, [-1, 1, 1]); b = mul.Tensor(f, j)",  # numbers the rows, but outside the body
        "r = mean.dim(f, [1], True); b = sub.Tensor(f, r)",
        "r = index.Tensor(f, [None, None, eight]); b = relu(r)",
        "r = roll(f, [1], [1]); h = chunk(r, 2, -1); h0 = h[0]; h1 = h[1]; b = cat([h1, h0], -1)",
        "h = unbind.int(f, 2); h0 = h[0]; h7 = h[7]; r = stack([h0, h7], 2); b = repeat(r, [1, 1, 4])",
        "r = view(f, [-1, 8]); k = linear(r, k_in); b = view(k, [n, m, 8])",  # tokens folded into the batch, and out
        "r = repeat_interleave.self_int(f, 2, 0); k = view(r, [n, 2, m, 8]); b = select.int(k, 1, 0)",
        "i = argmax(f, -1); k = index.Tensor(k_in, [i]); b = add.Tensor(f, k)",  # lines of a table
        "t = transpose.int(f, 0, 1); r = reshape(t, [-1, 8]); k = linear(r, k_in); u = view(k, [m, n, 8]); "
        "b = transpose.int(u, 0, 1)",  # the same with the tokens in front
        "r = view(f, [n, m, 2, 4]); t = transpose.int(r, 1, 2); k = scaled_dot_product_attention(t, t, t); "
        "u = transpose.int(k, 1, 2); b = reshape(u, [n, m, 8])",
        "r = einsum('bnc,bmc->bnm', [f, f]); b = einsum('bnm,bmc->bnc', [r, f])",
        "r = transpose.int(f, 1, 2); k = bmm(f, r); b = bmm(k, f)",
        "r = transpose.int(f, 0, 1); k = matmul(r, k_in); b = transpose.int(k, 0, 1)",  # rows in the lines
        "r = permute(f, [1, 2, 0]); k = matmul(k_in, r); b = permute(k, [2, 0, 1])",  # rows in the columns
        "r = zeros([n, m, 8]); b = add.Tensor(f, r)",
        "r = type_as(scale, f); b = mul.Tensor(f, r)",  # of the rows, only the type is read
        "r = unsqueeze(f, 0); k = squeeze.dim(r, 0); b = layer_norm(k, [8])",
        "h = topk(f, 8); r = h[0]; b = neg(r)",
        "r = constant_pad_nd(f, [0, 0, 1, 0]); b = slice.Tensor(r, 1, 0, m)",
        "t = transpose.int(f, 0, 1); v = matmul(t, scale); r = transpose.int(v, 0, 1); k = unsqueeze(r, 2); "
        "b = mul.Tensor(f, k)",  # a vector on the right
        "t = permute(f, [1, 2, 0]); v = matmul(scale, t); r = transpose.int(v, 0, 1); k = unsqueeze(r, 2); "
        "b = mul.Tensor(f, k)",  # and on the left
        "t = permute(f, [2, 1, 0]); v = tensordot(t, k_in, [0], [0]); b = transpose.int(v, 0, 1)",
        "g = index.Tensor(f, [None, eight]); r = neg(g); b = index_put(f, [None, eight], r)",
        "b = index_put(f, [None, eight], scale)",
        "b = index_put(f, [None, None, eight], f)",
        "r = unsqueeze(f, 1); k = im2col(r, [1, 8], [1, 1], [0, 0], [1, 1]); b = transpose.int(k, 1, 2)",
        "t = transpose.int(f, 0, 1); v = unfold(t, 0, 1, 1); r = squeeze.dim(v, 3); b = transpose.int(r, 0, 1)",
    ],
)
def test_an_operator_that_works_within_rows_leaves_them_apart(between: str) -> None:
    inputs = INPUTS + "    eight: param i64[8]\n    scale: param f32[8]\n"
    (branch,) = discover(with_rows(between.replace("; ", "\n")), inputs).branches
    assert branch.why_not_separable == ""
    assert branch.row_separable


def test_a_body_that_numbers_its_rows_keeps_them_together() -> None:
    between = "k = sym_size.int(f, 0)\n i = arange(k)\n j = view(i, [-1, 1, 1])\n b = mul.Tensor(f, j)"
    (branch,) = discover(with_rows(between)).branches
    assert branch.why_not_separable == "arange (i) makes a value for each row of the batch"


def test_a_size_of_the_batch_that_cannot_be_measured_inside_keeps_rows_together() -> None:
    between = "two = cat([s, s], 0)\n n2 = sym_size.int(two, 0)\n r = view(f, [n2, -1, 8])\n b = view(r, [n, m, 8])"
    (branch,) = discover(with_rows(between)).branches
    assert branch.why_not_separable.startswith("the size 2*s")
    assert branch.why_not_separable.endswith(" is computed from the batch outside the branch")


def test_an_entry_that_all_rows_share_keeps_them_together() -> None:
    between = "r = mean.dim(x, [0, 1])\n b = mul.Tensor(f, r)"
    (branch,) = discover(with_rows(between)).branches
    assert branch.why_not_separable == "entry r has no batch axis"


def test_a_flip_before_the_body_is_not_its_business() -> None:
    (branch,) = discover("z = flip(x, [0])\n d = linear(z, q_in)\n y = add.Tensor(x, d)\n return y").branches
    assert branch.row_separable


def test_an_axis_that_is_folded_at_the_end_of_a_body_is_unfolded_in_it() -> None:
    """As ``torch.nn.MultiheadAttention`` does."""
    found = discover("""
        n = sym_size.int(x, 0)
        m = sym_size.int(x, 1)
        t = transpose.int(x, 0, 1)
        q = linear(t, q_in)
        heads = operator.mul(n, 2)
        h = view(q, [m, heads, 4])
        h1 = transpose.int(h, 0, 1)
        a = scaled_dot_product_attention(h1, h1, h1)
        u = transpose.int(a, 0, 1)
        c1 = reshape(u, [-1, 8])
        d = linear(c1, o_in)
        e = view(d, [m, n, 8])
        f = transpose.int(e, 0, 1)
        y = add.Tensor(x, f)
        return y
    """)
    assert bodies(found) == ["q h h1 a u c1 d e"]
    (branch,) = found.branches
    assert branch.why_not_separable == ""
    assert [(output.name, output.batch_axis) for output in branch.outputs] == [("e", 1)]


def test_rows_of_windows_that_were_folded_before_the_body_are_taken_apart_at_its_border() -> None:
    found = discover(
        "    n = sym_size.int(x, 0)\n    m = sym_size.int(x, 1)\n    w = view(x, [-1, 4, 8])\n    f = linear(w, q_in)\n"
        "    a = scaled_dot_product_attention(f, f, f)\n    d = linear(a, o_in)\n    u = view(d, [n, m, 8])\n"
        "    y = add.Tensor(x, u)\n    return y"
    )
    (branch,) = found.branches
    assert branch.row_separable
    assert [(entry.shape, entry.batch_axis) for entry in branch.entries] == [((2, 4, 4, 8), 0)]


def test_windows_of_which_a_sample_has_every_other_keep_rows_together() -> None:
    found = discover(
        "    n = sym_size.int(x, 0)\n    m = sym_size.int(x, 1)\n    v = view(x, [n, -1, 4, 8])\n"
        "    t = transpose.int(v, 0, 1)\n    w = reshape(t, [-1, 4, 8])\n    f = linear(w, q_in)\n"
        "    a = scaled_dot_product_attention(f, f, f)\n    d = linear(a, o_in)\n    p = view(d, [-1, n, 4, 8])\n"
        "    b = transpose.int(p, 0, 1)\n    u = reshape(b, [n, m, 8])\n    y = add.Tensor(x, u)\n    return y"
    )
    (branch,) = found.branches
    assert branch.why_not_separable.startswith("input w has its rows folded into another axis")
    assert [entry.batch_axis for entry in branch.entries] == [None]


def test_a_fixed_batch_keeps_rows_together() -> None:
    inputs = "    x: f32[2, N, 8]\n    w: param f32[8, 8]\n"
    (branch,) = discover("    d = linear(x, w)\n    y = add.Tensor(x, d)\n    return y", inputs).branches
    assert branch.why_not_separable == "the batch size is fixed in this graph"
