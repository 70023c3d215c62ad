"""Engines of real model classes: one jump for each gate, nothing heavy outside, attention fused in half precision.

TensorRT-RTX builds them here without a GPU; what they take to run cannot be measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import lazy_compile
from lazy_compile import LazyModule
from lazy_compile.backends.onnx.export import OnnxReport, export_onnx
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.digests import verification
from lazy_compile.ir.branch import BranchKind
from support.diffusers_families import FAMILIES, family
from support.slow import slow_but

RTX = BuildConfig(flavor="rtx")
EVERY_RUN = [("dit", torch.float16), ("pixart", torch.float16)]
"""Self-attention and cross-attention, fused; the others with ``make test-slow``."""
ATTENTION = {BranchKind.CROSS_ATTENTION, BranchKind.JOINT_ATTENTION, BranchKind.SELF_ATTENTION, BranchKind.PARALLEL}

Exported = Callable[[str, torch.dtype], tuple[LazyModule, Path, OnnxReport]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made: dict[tuple[str, torch.dtype], tuple[LazyModule, Path, OnnxReport]] = {}

    def get(name: str, dtype: torch.dtype) -> tuple[LazyModule, Path, OnnxReport]:
        if (name, dtype) not in made:
            lazy = lazy_compile.transform(*family(name, dtype))
            path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
            made[name, dtype] = lazy, path, export_onnx(lazy, path, dynamic=False)
        return made[name, dtype]

    return get


@pytest.mark.parametrize(("name", "dtype"), slow_but(EVERY_RUN, product(FAMILIES, (torch.float16, torch.float32))))
def test_every_branch_is_real(name: str, dtype: torch.dtype, exported: Exported, tmp_path: Path) -> None:
    lazy, path, _ = exported(name, dtype)
    structure = build_engine(path, tmp_path / "m.engine", RTX).structure
    assert structure.problems == ()
    assert [branch.name for branch in structure.branches] == [f"lazy_branch_{b.index}" for b in lazy.branches]
    assert min(structure.heavy_inside, structure.heavy_always) > 0
    assert structure.host_copies == len(lazy.branches)
    if dtype == torch.float16:
        attention = [branch.index for branch in lazy.branches if branch.kind in ATTENTION]
        fused = [any(layer.is_fused_attention for layer in branch.compute) for branch in structure.branches]
        assert [index for index, found in enumerate(fused) if found] == attention


@pytest.mark.parametrize("dtype", slow_but([torch.float16], [torch.float16, torch.float32]))
def test_a_product_that_slipped_out_of_its_arm_is_seen(dtype: torch.dtype, exported: Exported, tmp_path: Path) -> None:
    model = ir.load(exported("dit", dtype)[1])
    conditional = next(node for node in model.graph if node.op_type == "If")
    body = conditional.attributes["then_branch"].as_graph()
    product = next(node for node in body if node.op_type == "MatMul")
    body.remove(product)
    model.graph.insert_before(conditional, product)
    onnx.save(ir.to_proto(model), tmp_path / "hoisted.onnx")
    with verification(False):
        structure = build_engine(tmp_path / "hoisted.onnx", tmp_path / "m.engine", RTX).structure
    assert structure.problems == (f"1 heavy kernels of a branch run at every step: {product.name}",)
