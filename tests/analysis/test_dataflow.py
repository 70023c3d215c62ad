from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from lazy_compile.analysis.dataflow import Dataflow
from support.graph_text import program

DIAMOND = """
    x: f32[B, N, 8]
    a = cos(x)
    b = sin(a)
    c = neg(a)
    d = add.Tensor(b, c)
    e = exp(x)
    return d, e
"""


@pytest.fixture
def flow() -> Dataflow:
    return Dataflow(program(DIAMOND).graph)


def names(flow: Dataflow, bits: int) -> str:
    return " ".join(node.name for node in flow.members(bits))


def node(flow: Dataflow, name: str) -> fx.Node:
    return next(node for node in flow.nodes if node.name == name)


def test_ancestors_and_descendants_hold_the_node_itself(flow: Dataflow) -> None:
    assert names(flow, flow.ancestors(node(flow, "b"))) == "x a b"
    assert names(flow, flow.descendants(node(flow, "b"))) == "b d output"
    assert names(flow, flow.descendants(node(flow, "a"))) == "a b c d output"


def test_dependence_is_a_question_of_direction(flow: Dataflow) -> None:
    assert flow.depends(node(flow, "d"), on=node(flow, "a"))
    assert not flow.depends(node(flow, "a"), on=node(flow, "d"))
    assert not flow.depends(node(flow, "d"), on=node(flow, "e"))


def test_a_region_is_what_lies_on_a_path_less_its_source(flow: Dataflow) -> None:
    assert names(flow, flow.region(node(flow, "a"), node(flow, "d"))) == "b c d"
    assert names(flow, flow.region(node(flow, "b"), node(flow, "d"))) == "d"
    assert flow.region(node(flow, "b"), node(flow, "c")) == 0
    assert flow.region(node(flow, "d"), node(flow, "a")) == 0


def test_a_hull_is_what_lies_between_its_members(flow: Dataflow) -> None:
    ends = flow.bits([node(flow, "a"), node(flow, "d")])
    assert names(flow, flow.hull(ends)) == "a b c d"
    assert names(flow, flow.hull(flow.bits([node(flow, "b"), node(flow, "e")]))) == "b e"
    assert flow.hull(0) == 0


def test_sets_are_read_back_in_graph_order(flow: Dataflow) -> None:
    chosen = [node(flow, name) for name in ("e", "a", "c")]
    assert names(flow, flow.bits(chosen)) == "a c e"
    assert flow.bits([]) == 0


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 80), seed=st.integers(0, 1000))
def test_reachability_is_that_of_a_walk_along_the_edges(size: int, seed: int) -> None:
    generator, graph = random.Random(seed), fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(size):
        arguments = tuple(generator.choices(nodes, k=generator.randint(1, 3)))
        nodes.append(graph.call_function(print, arguments))
    flow = Dataflow(graph)
    for end in nodes:
        seen, frontier = {end}, [end]
        while frontier:
            new = set(frontier.pop().all_input_nodes) - seen
            seen |= new
            frontier += new
        assert set(flow.members(flow.ancestors(end))) == seen
        assert all(flow.descendants(start) >> flow.position[end] & 1 for start in seen)
        assert sum(flow.descendants(start) >> flow.position[end] & 1 for start in nodes) == len(seen)
