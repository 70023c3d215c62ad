from __future__ import annotations

import pytest
import torch

import lazy_compile
from lazy_compile.passes.canonicalize import Canonicalize
from support.graph_text import after, calls, program
from support.layers import MLP, WIDTH
from support.toy_models import randomize

INPUTS = """
    x: f32[B, N, 8]
    h: f16[B, N, 8]
    i: i64[B, N]
    w: param f32[8, 8]
"""


@pytest.mark.parametrize(
    "noop",
    [
        "alias(x)",
        "clone(x)",
        "clone(x, memory_format=preserve_format)",
        "_to_copy(x)",
        "_to_copy(x, dtype=float32)",
        "dropout(x, 0.1, False)",
        "slice.Tensor(x, 1, 0, 9223372036854775807)",
        "slice.Tensor(x, 1)",
        "squeeze.dim(x, 1)",  # of a length that is not 1
        "expand(x, [-1, -1, 8])",
        "mul.Tensor(x, 1)",
        "mul.Tensor(x, 1.0)",
        "div.Tensor(x, 1.0)",
    ],
)
def test_an_operator_that_hands_on_its_input_goes_modified_true(noop: str) -> None:
    source = f"{INPUTS}    n = {noop}\n    y = linear(n, w)\n    return y"
    assert after(Canonicalize(), source) == ("y = linear(x, w)\nreturn y", True)


def test_what_is_written_over_the_whole_of_a_tensor_goes_modified_true() -> None:
    source = (
        f"{INPUTS}    e = empty_like(x)\n    s = slice.Tensor(e, 2, 0, 4)\n    v = slice.Tensor(x, 2, 4, 8)\n"
        "    c = {}\n    o = slice_scatter(e, c, 2, 0, 4)\n    y = linear(o, w)\n    return y"
    )
    kept = (
        "e = empty_like(x)\nv = slice.Tensor(x, 2, 4, 8)\no = slice_scatter(e, v, 2, 0, 4)\ny = linear(o, w)\nreturn y"
    )
    assert after(Canonicalize(), source.format("copy(s, v)")) == (kept, True)
    cast = source.format("copy(s, h4)").replace("    e = ", "    h4 = slice.Tensor(h, 2, 4, 8)\n    e = ", 1)
    assert "copy(s, h4)" in after(Canonicalize(), cast)[0]  # another type


def test_a_squeeze_of_nothing_goes_from_a_result_too_modified_true() -> None:
    source = f"{INPUTS}    y = linear(x, w)\n    n = squeeze.dim(y, 1)\n    r = transpose.int(n, 1, 2)\n    return r"
    assert after(Canonicalize(), source) == ("y = linear(x, w)\nr = transpose.int(y, 1, 2)\nreturn r", True)


@pytest.mark.parametrize(
    "operation",
    [
        "clone(t, memory_format=contiguous_format)",  # other strides
        "_to_copy(x, dtype=float16)",
        "dropout(x, 0.1, True)",
        "slice.Tensor(x, 1, 0, 9223372036854775807, 2)",
        "slice.Tensor(x, 1, 1, 9223372036854775807)",
        "slice.Tensor(x, 1, 0, 3)",
        "mul.Tensor(x, 2)",
        "mul.Tensor(x, x)",
        "mul.Tensor(i, 1.0)",  # an integer becomes a fraction
        "div.Tensor(i, 1)",
        "div.Tensor_mode(x, 1.0, rounding_mode='floor')",
        "detach(x)",  # gradients stop here
        "unsqueeze(x, 0)",
    ],
)
def test_an_operator_that_changes_something_stays_modified_false(operation: str) -> None:
    source = f"{INPUTS}    t = transpose.int(x, 1, 2)\n    n = {operation}\n    y = neg(n)\n    return y, t"
    assert after(Canonicalize(), source) == (calls(source), False)


def test_a_chain_of_copies_goes_modified_true() -> None:
    source = """
        x: f32[B, N, 8]
        w: param f32[8, 8]
        a = slice.Tensor(x, 0, 0, 9223372036854775807)
        b = clone(a)
        c = div.Tensor(b, 1.0)
        y = linear(c, w)
        return y
    """
    assert after(Canonicalize(), source) == ("y = linear(x, w)\nreturn y", True)


def test_what_nobody_uses_goes_modified_true() -> None:
    source = """
        x: f32[B, N, 8]
        a = neg(x)
        b = exp(a)
        n = sym_size.int(x, 1)
        y = cos(x)
        return y
    """
    assert after(Canonicalize(), source) == ("y = cos(x)\nreturn y", True)


def test_checks_of_metadata_go_modified_true() -> None:
    source = """
        x: f32[B, N, 8]
        check = _assert_tensor_metadata(x, None, None, float32)
        y = cos(x)
        return y
    """
    assert after(Canonicalize(), source) == ("y = cos(x)\nreturn y", True)


def test_a_copy_that_the_caller_receives_stays_modified_false() -> None:
    source = """
        x: f32[B, N, 8]
        a = clone(x)
        b = clone(x)
        v = transpose.int(b, 1, 2)
        return a, v
    """
    assert after(Canonicalize(), source) == (calls(source), False)


def test_inputs_stay_even_if_nobody_reads_them() -> None:
    source = program("x: f32[B, N, 8]\nunused: f32[B]\ny = cos(x)\nreturn y")
    result = Canonicalize()(source)
    assert not result.modified
    assert result.program.inputs == source.inputs
    assert len(result.program.placeholders) == 2


def test_gradients_stop_where_the_model_stops_them() -> None:
    class Stopped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.mlp(x)) * x.detach()

    model = randomize(Stopped()).eval()
    lazy = lazy_compile.transform(model)
    gradients = []
    for each in (model, lazy):
        x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
        each(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
