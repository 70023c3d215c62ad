"""The rules of lowering: a model that keeps them, and one that breaks each."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from lazy_compile.backends.onnx.conditionals import sink_branches
from lazy_compile.backends.onnx.rules import check_rules
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.errors import BackendError

SOUND = """<ir_version: 10, opset_import: ["": 23]>
g (float16[2, 4, 8] x, float16[2, 4, 8] cache, float[8] w, float16[8, 8] p, float16 scale)
=> (float16[2, 4, 8] y, float16[2, 4, 8] next_cache)
<float zero = {0}, int64[1] tokens = {1}, int64[1] all = {0}, int8 point = {0}> {
  wide = Cast <to = 1> (x)
  mean = ReduceMean <keepdims = 0> (wide, tokens)
  product = Mul (mean, w)
  logit = ReduceSum <keepdims = 0> (product, all)
  logits = ReduceSum <keepdims = 0> (logit, all)
  condition = Greater (logits, zero)
  o = If (condition) <
    then_branch = compute () => (float16[2, 4, 8] a) {
      quantized = QuantizeLinear (x, scale, point)
      z = DequantizeLinear (quantized, scale, point)
      a = MatMul (z, p)
    },
    else_branch = reuse () => (float16[2, 4, 8] b) { b = Identity (cache) }
  >
  y = Add (x, o)
  next_cache = Identity (o)
}"""
"""A gate that reads the mean token in float32, and a branch that computes with quantized activations."""


def model(*changes: tuple[str, str]) -> ir.Model:
    text = SOUND
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def test_a_model_that_keeps_all_rules() -> None:
    assert check_rules(model()) == ()


ATTENTION = ("a = MatMul (z, p)", "a = Attention <q_num_heads = 2, kv_num_heads = 2> (z, z, z)")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ([ATTENTION], "Attention stands inside an arm; expected its parts"),
        ([("keepdims = 0> (logit, all)", "keepdims = 1> (logit, all)")], r"its condition is BOOL[1]; expected BOOL[]"),
        ([("b = Identity (cache)", "b = Identity (w)"), ("(float16[2, 4, 8] b)", "(float[8] b)")], "its arms return"),
        ([("{ b = Identity (cache) }", "{ }"), ("[2, 4, 8] b)", "[2, 4, 8] cache)")], "cache, which is made outside"),
        (
            [
                ("o = If", "eight = Cast <to = 17> (x)\n o = If"),
                ("a = MatMul (z, p)", "back = Cast <to = 10> (eight)\n a = MatMul (back, p)"),
            ],
            "eight crosses its border as FLOAT8E4M3FN; convert it inside the arm",
        ),
        (
            [
                ("      quantized = QuantizeLinear (x, scale, point)\n", ""),
                ("o = If", "quantized = QuantizeLinear (x, scale, point)\n  o = If"),
            ],
            "QuantizeLinear quantizes outside what compute dequantizes",
        ),
        ([("=> (float16[2, 4, 8] y,", "=> (float16[2, 4, 8] x, float16[2, 4, 8] y,")], "output x is an input"),
        (
            [
                ("wide = Cast <to = 1> (x)\n  mean = ReduceMean <keepdims = 0> (wide, tokens)",
                 "half = ReduceMean <keepdims = 0> (x, tokens)\n  mean = Cast <to = 1> (half)"),
            ],
            "its predicate is reduced in FLOAT16",
        ),
        (
            [
                ("wide = Cast <to = 1> (x)\n  mean", "mean"), ("(wide, tokens)", "(x, tokens)"),
                ("float[8] w,", "float16[8] w,"), ("float zero", "float16 zero"),
            ],
            "its predicate is computed in FLOAT16",
        ),
    ],
    ids=["attention", "condition", "shapes", "identity", "fp8", "quantized", "aliased", "reduced", "predicate"],
)  # fmt: skip
def test_a_model_that_breaks_a_rule(changes: list[tuple[str, str]], complaint: str) -> None:
    found = check_rules(model(*changes))
    assert any(complaint in line for line in found), found


def test_attention_inside_an_arm_does_not_build(tmp_path: Path) -> None:
    """Why the first rule is there: the same model builds without it."""
    unquantized = (
        ("      quantized = QuantizeLinear (x, scale, point)\n", ""),
        (
            "z = DequantizeLinear (quantized, scale, point)",
            "z = Identity (x)",
        ),
    )
    for changes in ((), (ATTENTION,)):
        proto = ir.to_proto(model(*unquantized, *changes))
        onnx.save(proto, tmp_path / "m.onnx")
        if changes:
            with pytest.raises(BackendError):
                build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", BuildConfig(flavor="rtx"))
        else:
            build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", BuildConfig(flavor="rtx"))


def test_quantization_sinks_into_the_arm_that_needs_it() -> None:
    flat = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21, "lazy_compile": 1]>
    g (float[2, 8] x, bool c, float[8, 8] p, float[2, 8] cache, float scale, int8 point) => (float[2, 8] next_cache) {
      quantized = QuantizeLinear (x, scale, point)
      z = DequantizeLinear (quantized, scale, point)
      a = MatMul (z, p)
      next_cache = lazy_compile.Select <conditional = 0> (c, a, cache)
    }""")
    )
    assert sink_branches(flat) == 1
    (conditional,) = flat.graph
    body = conditional.attributes["then_branch"].as_graph()
    assert [node.op_type for node in body] == ["QuantizeLinear", "DequantizeLinear", "MatMul"]
    assert not [line for line in check_rules(flat) if "quantize" in line]
