from __future__ import annotations

import pytest
import torch
from torch import fx

from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.program import Program
from lazy_compile.passes.discover_branches import DiscoverBranches
from lazy_compile.passes.outline_branches import OutlineBranches
from support.graph_text import after, program, text

INPUTS = """
    x: f32[B, N, 8]
    s: f32[B, M, 8]
    c: f32[B, 1, 8]
    w: param f32[8, 8]
    up: param f32[32, 8]
    down: param f32[8, 32]
"""
MLP = """
    z = mul.Tensor(x, c)
    u = linear(z, up)
    a = gelu(u)
    d = linear(a, down)
    y = add.Tensor(x, d)
    return y
"""


def outline(source: str) -> Program:
    return OutlineBranches()(DiscoverBranches()(program(INPUTS + source)).program).program


def body(found: Program, index: int) -> fx.GraphModule:
    module = found.graph_module.get_submodule(f"branch_{index}")
    assert isinstance(module, fx.GraphModule)
    return module


def lines(source: str) -> str:
    return "\n".join(line.strip() for line in source.strip().splitlines())


def assert_same_results(source: str, **sizes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    before, outlined = DiscoverBranches()(program(INPUTS + source)).program, outline(source)
    lengths = {"B": 3, "N": 6, "M": 4, **sizes}
    shapes = [[lengths["B"], lengths["N"], 8], [lengths["B"], lengths["M"], 8], [lengths["B"], 1, 8], [8, 8], [32, 8]]
    tensors = [torch.randn(shape, generator=generator) for shape in [*shapes, [8, 32]]]
    for seen, expected in zip(outlined.graph_module(*tensors), before.graph_module(*tensors), strict=True):
        assert torch.equal(seen, expected)


def test_a_tagged_body_becomes_a_submodule_modified_true() -> None:
    found = outline(MLP)
    assert text(found.graph) == lines("""
        z = mul.Tensor(x, c)
        branch_0 = branch_0(z, up, down)
        getitem = branch_0[0]
        y = add.Tensor(x, getitem)
        return y
    """)
    assert text(body(found, 0).graph) == lines("""
        u = linear(z, up)
        a = gelu(u)
        d = linear(a, down)
        return d
    """)
    assert_same_results(MLP)


def test_views_of_weights_that_nobody_else_reads_belong_to_the_body() -> None:
    source = """
        z = mul.Tensor(x, c)
        p = t(down)
        q = permute(p, [1, 0])
        v = t(w)
        u = linear(z, up)
        a = gelu(u)
        d = linear(a, q)
        y = add.Tensor(x, d)
        e = matmul(y, v)
        f = add.Tensor(y, e)
        g = matmul(f, v)
        r = mul.Tensor(g, 2.0)
        return r
    """
    found = outline(source)
    assert "branch_0 = branch_0(down, z, up)" in text(found.graph)
    assert "p = t(down)" in text(body(found, 0).graph)
    assert "v = t(w)" in text(found.graph)  # two read it
    assert_same_results(source)


def test_a_graph_without_tags_modified_false() -> None:
    assert after(OutlineBranches(), INPUTS + MLP)[1] is False


def test_a_second_run_modified_false() -> None:
    assert not OutlineBranches()(outline(MLP)).modified


def test_the_program_before_is_left_as_it_was() -> None:
    source = DiscoverBranches()(program(INPUTS + MLP)).program
    before = text(source.graph)
    OutlineBranches()(source)
    assert text(source.graph) == before
    assert [node.name for node in source.graph.nodes if TAG in node.meta] == ["u", "a", "d"]


def test_sizes_are_measured_inside_the_body() -> None:
    source = """
        n = sym_size.int(x, 0)
        m = sym_size.int(x, 1)
        z = mul.Tensor(x, c)
        f = linear(z, w)
        h = view(f, [n, m, 2, 4])
        k = softmax.int(h, 2)
        v = view(k, [n, m, 8])
        d = linear(v, w)
        y = add.Tensor(x, d)
        return y
    """
    found = outline(source)
    assert "branch_0 = branch_0(z, w)" in text(found.graph)
    assert text(body(found, 0).graph) == lines("""
        sym_size_int = sym_size.int(z, 0)
        sym_size_int_1 = sym_size.int(z, 1)
        f = linear(z, w)
        h = view(f, [sym_size_int, sym_size_int_1, 2, 4])
        k = softmax.int(h, 2)
        v = view(k, [sym_size_int, sym_size_int_1, 8])
        d = linear(v, w)
        return d
    """)
    assert_same_results(source)
    (some_rows,) = body(found, 0)(torch.ones(1, 6, 8), torch.ones(8, 8))  # a part of the batch
    assert some_rows.shape == (1, 6, 8)


def test_a_size_that_is_computed_is_computed_again_inside_the_body() -> None:
    source = """
        n = sym_size.int(x, 0)
        heads = operator.mul(n, 2)
        m = sym_size.int(x, 1)
        f = linear(x, w)
        t = transpose.int(f, 1, 2)
        h = reshape(t, [heads, 4, m])
        k = softmax.int(h, 2)
        u = view(k, [n, 8, m])
        v = transpose.int(u, 1, 2)
        d = linear(v, w)
        y = add.Tensor(x, d)
        return y
    """
    found = outline(source)
    assert "branch_0 = branch_0(x, w)" in text(found.graph)
    assert text(body(found, 0).graph).startswith(
        lines("""
        sym_size_int = sym_size.int(x, 0)
        heads = operator.mul(sym_size_int, 2)
        sym_size_int_1 = sym_size.int(x, 1)
        f = linear(x, w)
    """)
    )
    assert_same_results(source)


def test_a_size_that_no_input_has_is_passed_in() -> None:
    source = """
        words = sym_size.int(s, 1)
        f = linear(x, w)
        scaled = div.Tensor(f, words)
        d = linear(scaled, w)
        y = add.Tensor(x, d)
        return y
    """
    found = outline(source)
    assert "branch_0 = branch_0(x, w, words)" in text(found.graph)
    assert_same_results(source)


def test_every_value_that_is_read_outside_is_an_output() -> None:
    source = MLP.replace("return y", "e = neg(a)\n    return y, e")
    found = outline(source)
    assert text(found.graph) == lines("""
        z = mul.Tensor(x, c)
        branch_0 = branch_0(z, up, down)
        getitem = branch_0[0]
        getitem_1 = branch_0[1]
        y = add.Tensor(x, getitem_1)
        e = neg(getitem)
        return y, e
    """)
    assert_same_results(source)


def test_nodes_between_are_moved_where_their_inputs_exist() -> None:
    """The body of the joint attention ends behind the MLP that reads one of its outputs."""
    source = """
        q = linear(x, w)
        k = linear(s, w)
        both = cat([q, k], 1)
        a = scaled_dot_product_attention(both, both, both)
        m = sym_size.int(x, 1)
        first = slice.Tensor(a, 1, 0, m)
        x2 = linear(first, w)
        h = add.Tensor(x, x2)
        u = linear(h, up)
        g = gelu(u)
        d = linear(g, down)
        y = add.Tensor(h, d)
        second = slice.Tensor(a, 1, m, 9223372036854775807)
        s2 = linear(second, w)
        t = add.Tensor(s, s2)
        return y, t
    """
    found = outline(source)
    assert text(found.graph) == lines("""
        m = sym_size.int(x, 1)
        branch_0 = branch_0(x, w, s)
        getitem = branch_0[0]
        h = add.Tensor(x, getitem)
        branch_1 = branch_1(h, up, down)
        getitem_2 = branch_1[0]
        y = add.Tensor(h, getitem_2)
        getitem_1 = branch_0[1]
        t = add.Tensor(s, getitem_1)
        return y, t
    """)
    assert_same_results(source)


def test_the_call_and_its_results_say_what_they_carry() -> None:
    found = outline(MLP)
    call = next(iter(found.graph.find_nodes(op="call_module")))
    item = next(node for node in found.graph.nodes if node.name == "getitem")
    assert call.meta[TAG] == 0
    assert [value.shape for value in call.meta["val"]] == [item.meta["val"].shape]
    assert TAG not in item.meta


def test_a_branch_may_read_what_another_branch_returned() -> None:
    source = """
        q = linear(x, w)
        a = scaled_dot_product_attention(q, q, q)
        d = linear(a, w)
        h = add.Tensor(x, d)
        k = linear(s, w)
        q2 = linear(d, w)
        a2 = scaled_dot_product_attention(q2, k, k)
        y = add.Tensor(h, a2)
        return y
    """
    found = outline(source)
    assert [entry.name for entry in found.branches[1].entries] == ["d"]
    assert "d" in [node.name for node in body(found, 1).graph.find_nodes(op="placeholder")]
    assert_same_results(source)


@pytest.mark.parametrize("windows", ["[-1, 4, 8]", "[-1, m, 8]"], ids=["of four tokens", "of all tokens"])
def test_rows_that_are_folded_into_windows_can_be_picked_at_the_border(windows: str) -> None:
    source = """
        n = sym_size.int(x, 0)
        m = sym_size.int(x, 1)
        two = cat([x, x], 1)
        w1 = view(two, WINDOWS)
        f = linear(w1, w)
        k = softmax.int(f, 1)
        d = linear(k, w)
        g = mul.Tensor(d, 2.0)
        y = add.Tensor(w1, g)
        r = view(y, [n, -1, 8])
        return r
    """.replace("WINDOWS", windows)
    found = outline(source)
    (branch,) = found.branches
    assert branch.row_separable
    assert [tensor.shape[0] for tensor in (*branch.entries, *branch.outputs)] == [2, 2]
    inputs = [node.meta["val"] for node in body(found, 0).graph.find_nodes(op="placeholder")]
    assert [value.dim() for value in inputs if value.dim() > 2] == [4]
    assert_same_results(source)
