"""Formulas over free sizes, as files carry them."""

from __future__ import annotations

import pytest

from lazy_compile.backends.onnx.sizes import (
    ShapeRange,
    bound_sizes,
    holds,
    names_in,
    parse_ranges,
    parsed,
    shape_at,
    union_of,
    value_at,
)
from lazy_compile.errors import ConfigError


def test_a_formula_is_worked_out() -> None:
    sizes = {"height": 9, "width": 6}
    assert value_at("(height//2)*(width//2)", sizes) == 12
    assert value_at("max(height, 2*width)-height%4", sizes) == 11
    assert shape_at([3, "height"], sizes) == (3, 9)
    assert names_in("min(height, 4)+width") == {"height", "width"}


def test_a_condition_holds_or_does_not() -> None:
    assert holds("height%2 == 0 and height <= 16", {"height": 8})
    assert not holds("height%2 == 0 or not height > 3", {"height": 9})
    assert not holds("8//height > 1", {"height": 0})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "height.bit_length()",
        "9**9**9",
        "[1]",
        "height if 1 else 2",
        "1.5",
        "a(",
        "x" * 1001,
        "-" * 500 + "height",  # whoever works it out may stand deeper than who reads it
        "f(2)",
    ],
)
def test_nothing_else_is_a_formula(text: str) -> None:
    with pytest.raises(ValueError, match="is no formula over sizes"):
        parsed(text)


def test_a_size_that_is_not_known_is_named() -> None:
    with pytest.raises(ConfigError, match=r"size 'width' cannot be worked out from \{'height': 8\}"):
        value_at("width", {"height": 8})


def test_free_sizes_are_read_from_shapes() -> None:
    declared = {"x": ["batch", "2*tokens"], "text": ["batch", "tokens", 4]}
    assert bound_sizes(declared, {"text": (2, 5, 4), "x": (2, 10)}) == {"batch": 2, "tokens": 5}
    with pytest.raises(ConfigError, match="size 'batch' is 2 in one input and 3 in 'x'"):
        bound_sizes(declared, {"text": (2, 5, 4), "x": (3, 10)})
    with pytest.raises(ConfigError, match=r"shape \[2, 9\] of 'x' does not fit the model, in which it is \[batch, 2\*"):
        bound_sizes(declared, {"text": (2, 5, 4), "x": (2, 9)})


def test_profiles_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="--minShapes has two shapes of 'x'; for another profile, repeat the option"):
        parse_ranges(["x:1x4,x:2x4"], [], [])
    with pytest.raises(ConfigError, match="shapes of 'x' of different length; give one size an axis"):
        union_of(parse_ranges(["x:1x4", "x:1x4x4"], [], []))


def test_profiles_are_written_as_trtexec_writes_them() -> None:
    ranges = parse_ranges(["x:1x4,t:1", "x:3x4"], [], ["x:2x4", "x:8x4"])
    assert ranges == (
        ShapeRange({"x": (1, 4), "t": (1,)}, {}, {"x": (2, 4)}),
        ShapeRange({"x": (3, 4)}, {}, {"x": (8, 4)}),
    )
    assert union_of(ranges) == ShapeRange({"x": (1, 4), "t": (1,)}, {"x": (2, 4), "t": (1,)}, {"x": (8, 4), "t": (1,)})
