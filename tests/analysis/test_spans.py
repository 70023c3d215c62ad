"""Where stacks of branches can be cut, and what belongs to a span, on graphs written as text."""

from __future__ import annotations

import pytest

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.spans import BranchStack
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.program import Program
from lazy_compile.passes.discover_branches import DiscoverBranches
from lazy_compile.passes.merge_spans import MergeSpans
from support.graph_text import program

PLAIN = """
    x: f32[B, N, 8]
    c: f32[B, 1, 8]
    w: param f32[8, 8]
    s = linear(c, w)
    n0 = layer_norm(x, [8])
    m0 = mul.Tensor(n0, s)
    d0 = linear(m0, w)
    y0 = add.Tensor(x, d0)
    n1 = layer_norm(y0, [8])
    d1 = linear(n1, w)
    y1 = add.Tensor(y0, d1)
    out = layer_norm(y1, [8])
    return out
"""

JOINED = """
    x: f32[B, N, 8]
    t: f32[B, M, 8]
    w: param f32[8, 8]
    d0 = linear(x, w)
    y0 = add.Tensor(x, d0)
    e0 = linear(t, w)
    u0 = add.Tensor(t, e0)
    j = cat([u0, y0], 1)
    d1 = linear(j, w)
    k = add.Tensor(j, d1)
    m = sym_size.int(t, 1)
    out = slice.Tensor(k, 1, m, 9223372036854775807)
    return out
"""

SHARED_NORM = """
    x: f32[B, N, 8]
    w: param f32[8, 8]
    n = layer_norm(x, [8])
    d0 = linear(n, w)
    y0 = add.Tensor(x, d0)
    d1 = linear(n, w)
    y1 = add.Tensor(y0, d1)
    return y1
"""

LONG_SKIP = """
    x: f32[B, N, 8]
    w: param f32[8, 8]
    v: param f32[8, 16]
    d0 = linear(x, w)
    y0 = add.Tensor(x, d0)
    d1 = linear(y0, w)
    y1 = add.Tensor(y0, d1)
    j = cat([y1, y0], 2)
    z = linear(j, v)
    d2 = linear(z, w)
    y2 = add.Tensor(z, d2)
    d3 = linear(y2, w)
    y3 = add.Tensor(y2, d3)
    return y3
"""


def merged(text: str, *options: object) -> Program:
    return MergeSpans(*options)(DiscoverBranches()(program(text)).program).program


def relations(branch: ResidualBranch) -> dict[str, str | None]:
    return {output.name: output.relative_to for output in branch.outputs}


def body(found: Program, index: int) -> set[str]:
    return {node.name for node in found.graph.nodes if node.meta.get(TAG) == index}


def test_a_span_holds_norms_modulation_and_what_feeds_nothing_else() -> None:
    found = merged(PLAIN, "model")
    (span,) = found.branches
    assert body(found, 0) == {"s", "n0", "m0", "d0", "y0", "n1", "d1", "y1"}
    assert [entry.name for entry in span.entries] == ["x"]
    assert relations(span) == {"y1": "x"}


def test_spans_meet_at_a_stream() -> None:
    found = merged(PLAIN, 2)
    assert [relations(span) for span in found.branches] == [{"y0": "x"}, {"y1": "y0"}]
    assert body(found, 1) == {"n1", "d1", "y1"}


def test_what_follows_a_join_is_relative_to_what_was_joined() -> None:
    (span,) = merged(JOINED, "model").branches
    assert relations(span) == {"out": "x"}  # and the tokens of t, which nobody reads, are not kept
    *_, last = merged(JOINED, 3).branches
    assert relations(last) == {"out": "y0"}


def test_a_join_inside_is_repeated_outside_where_both_streams_are_kept() -> None:
    found = merged(JOINED.replace("return out", "both = layer_norm(k, [8])\n    return both"), "model")
    (span,) = found.branches
    ((output, base),) = relations(span).items()
    (node,) = (node for node in found.graph.nodes if node.name == base)
    assert output == "k"
    assert [item.name for item in node.args[0]] == ["t", "x"]
    assert TAG not in node.meta


def test_a_value_that_is_no_stream_is_not_cut_through() -> None:
    tagged = DiscoverBranches()(program(SHARED_NORM)).program
    stack = BranchStack(Dataflow(tagged.graph), len(tagged.branches))
    assert stack.why_no_cut(1) == "n (layer_norm) is read behind it, and is no residual stream"
    found = merged(SHARED_NORM, 2)
    assert len(found.branches) == 1
    assert [refusal.reason for refusal in found.refusals] == ["1 spans instead of 2: there are no more cuts"]


def test_a_stack_that_does_not_end_in_streams_stays_as_it_is() -> None:
    text = SHARED_NORM.replace("return y1", "late = mul.Tensor(n, y1)\n    return late")
    found = merged(text, "model")
    assert len(found.branches) == 2
    (refusal,) = found.refusals
    assert refusal.reason == (
        "no span: the stack has no end, since n (layer_norm) is read behind it, and is no residual stream"
    )


def test_long_skip_connections_are_further_outputs() -> None:
    first, second = merged(LONG_SKIP, 2).branches
    assert relations(first) == {"y0": "x", "y1": "x"}
    assert [entry.name for entry in second.entries] == ["y1", "y0"]
    assert relations(second) == {"y3": None}  # it goes through a linear layer
    *_, last = merged(LONG_SKIP, 4).branches
    assert relations(last) == {"y3": "y2"}


@pytest.mark.parametrize(("count", "names"), [(2, 2), (3, 3), (4, 4), (5, 4)])
def test_a_stack_is_cut_into_as_many_spans_as_it_can(count: int, names: int) -> None:
    assert len(merged(LONG_SKIP, count).branches) == names
