"""Slices that are written one after another, as functionalisation leaves them, and the join that takes their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_model import capture
from lazy_compile.ir.operators import operator_name
from lazy_compile.passes.canonicalize import Canonicalize
from lazy_compile.passes.join_slices import JoinSlices
from support.graph_text import after, calls

END = 2**63 - 1
INPUTS = """
    x: f32[B, N, 8]
    p: f32[B, N, 4]
    q: f32[B, N, 4]
    h: f16[B, N, 4]
"""


def written(*writes: str) -> str:
    """``base`` with these writes to it, the last of them called ``out``."""
    names = ["base", *(f"one{index}" for index in range(len(writes) - 1)), "out"]
    lines = [f"{new} = {write.replace('@', old)}" for old, new, write in zip(names, names[1:], writes, strict=False)]
    return INPUTS + "\n".join(["base = empty_like(x)", *lines, "r = cos(out)", "return r"])


EVEN, ODD = f"slice_scatter(@, p, 2, 0, {END}, 2)", f"slice_scatter(@, q, 2, 1, {END}, 2)"
FRONT, BACK = "slice_scatter(@, p, 2, 0, 4)", f"slice_scatter(@, q, 2, 4, {END})"


@pytest.mark.parametrize(
    ("writes", "joined"),
    [
        ((EVEN, ODD), "stack_default = stack([p, q], 3)\nflatten_using_ints = flatten.using_ints(stack_default, 2, 3)"),
        ((ODD, EVEN), "stack_default = stack([p, q], 3)\nflatten_using_ints = flatten.using_ints(stack_default, 2, 3)"),
        ((FRONT, BACK), "cat_default = cat([p, q], 2)"),
        ((BACK.replace(", 2, 4", ", -1, -4"), FRONT), "cat_default = cat([p, q], 2)"),
    ],
)
def test_writes_that_reach_every_place_once_become_one_join_modified_true(writes: tuple[str, ...], joined: str) -> None:
    name = joined.splitlines()[-1].partition(" ")[0]
    assert after(JoinSlices(), written(*writes)) == (f"{joined}\nr = cos({name})\nreturn r", True)


def test_single_places_are_stacked_modified_true() -> None:
    source = "x: f32[B, N, 2]\np: f32[B, N]\nq: f32[B, N]\nbase = zeros_like(x)\none = select_scatter(base, q, 2, -1)\n"
    source += "out = select_scatter(one, p, 2, 0)\nr = cos(out)\nreturn r"
    expected = "stack_default = stack([p, q], 2)\nr = cos(stack_default)\nreturn r"
    assert after(JoinSlices(), source) == (expected, True)


@pytest.mark.parametrize(
    "writes",
    [
        (EVEN,),
        (EVEN, EVEN.replace("p", "q")),
        (FRONT, "slice_scatter(@, q, 2, 3, 7)"),
        (EVEN, BACK),
        ("slice_scatter(@, h, 2, 0, 4)", BACK),
    ],
    ids=["half", "the same half twice", "overlapping", "of two kinds", "of another dtype"],
)
def test_other_writes_stay_modified_false(writes: tuple[str, ...]) -> None:
    source = written(*writes)
    assert after(JoinSlices(), source) == (calls(source), False)


def test_what_is_read_in_between_stays_modified_false() -> None:
    source = written(EVEN, ODD).replace("r = cos(out)", "s = sin(one0)\nr = add.Tensor(out, s)")
    assert after(JoinSlices(), source) == (calls(source), False)


@pytest.mark.parametrize(
    ("copy", "value"),
    [("copy(base, x)", ""), ("copy(base, k)", "_to_copy_default = _to_copy(k, dtype=float32)\n")],
    ids=["of the same type", "of another dtype"],
)
def test_a_copy_into_a_tensor_is_its_value_modified_true(copy: str, value: str) -> None:
    source = f"x: f32[B, N, 8]\nk: f16[B, N, 8]\nbase = empty_like(x)\nc = {copy}\nr = cos(c)\nreturn r"
    name = "_to_copy_default" if value else "x"
    assert after(JoinSlices(), source) == (f"{value}r = cos({name})\nreturn r", True)


def test_a_result_of_the_caller_keeps_its_copy_modified_false() -> None:
    source = "x: f32[B, N, 8]\nbase = empty_like(x)\nc = copy(base, x)\nv = view(c, [-1, 8])\nreturn v"
    assert after(JoinSlices(), source) == (calls(source), False)


class Rotary(nn.Module):
    """Rotates pairs of eight channels, written slice by slice into a tensor of the input's dtype."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = F.layer_norm(x, (8,))
        one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = one * cos - other * sin
        out[..., 1::2] = one * sin + other * cos
        return out.neg()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotary_embedding_is_joined_and_bitwise_the_same(dtype: torch.dtype) -> None:
    x, cos, sin = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(4), torch.randn(4)
    layout, tensors = CallLayout.of((x, cos, sin), {})
    joined = JoinSlices()(Canonicalize()(capture(Rotary(), layout, tensors).program).program).program
    names = [operator_name(node) for node in joined.graph.nodes]
    assert "slice_scatter" not in names
    assert "copy" not in names
    assert names.count("stack") == 1
    (out,) = joined.graph_module(x, cos, sin)
    assert torch.equal(out, Rotary()(x, cos, sin))
