"""The structural check of exported models: every branch one conditional, with all that it needs inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from lazy_compile import LazyModule
from lazy_compile.backends.onnx.export import OnnxReport, check_structure
from lazy_compile.backends.onnx.structure import MARK

Exported = Callable[[str, str], tuple[LazyModule, Path, OnnxReport]]


def test_bodies_are_marked_and_stand_in_their_arms(exported: Exported) -> None:
    _, path, report = exported("dit", "linear")
    model = ir.load(path)
    for branch, conditional in enumerate(node for node in model.graph if node.op_type == "If"):
        body = conditional.attributes["then_branch"].as_graph()
        marks = {node.metadata_props[MARK] for node in body if node.op_type == "MatMul"}
        assert marks == {conditional.name.removeprefix("lazy_branch_")}, branch
        assert not conditional.inputs[0].shape
    assert report.heavy_ops_inside > report.always_on > 0


def hoist(path: Path, marked: bool) -> ir.Model:
    """A model in which one matrix product of an arm has slipped into the main graph."""
    model = ir.load(path)
    conditional = next(node for node in model.graph if node.op_type == "If")
    body = conditional.attributes["then_branch"].as_graph()
    product = next(node for node in body if node.op_type == "MatMul")
    body.remove(product)
    model.graph.insert_before(conditional, product)
    if not marked:
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            node.metadata_props.clear()
    return model


@pytest.mark.parametrize("marked", [True, False])
def test_a_product_that_slipped_out_of_its_arm_is_seen(exported: Exported, marked: bool) -> None:
    model = hoist(exported("dit", "linear")[1], marked)
    report = check_structure(ir.to_proto(model))
    assert len(report.heavy_ops_outside_if) == 1
    assert report.problems[0].startswith("1 heavy operators of a branch run outside its If: node_")


def test_a_product_that_others_use_too_is_seen_by_its_mark(exported: Exported) -> None:
    for marked in (True, False):
        model = hoist(exported("dit", "linear")[1], marked)
        product = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
        model.graph.outputs.append(next(node for node in product if node.op_type == "Add").inputs[0])
        assert len(check_structure(model).heavy_ops_outside_if) == marked


def test_swapped_arms_are_seen(exported: Exported) -> None:
    model = onnx.load(exported("dit", "linear")[1])
    conditional = next(node for node in model.graph.node if node.op_type == "If")
    for attribute in conditional.attribute:
        attribute.name = "else_branch" if attribute.name == "then_branch" else "then_branch"
    assert [line.partition(":")[0] for line in check_structure(model).problems] == [
        "6 heavy operators run while a branch is reused",
        "1 If nodes compute nothing heavy",
    ]


def test_a_missing_conditional_is_seen(exported: Exported) -> None:
    model = ir.load(exported("dit", "linear")[1])
    conditional = [node for node in model.graph if node.op_type == "If"][-1]
    conditional.outputs[0].replace_all_uses_with(model.graph.inputs[3], replace_graph_outputs=True)
    model.graph.remove(conditional)
    assert check_structure(model).problems == ("3 If nodes for 4 branches",)
