"""ONNX models with one conditional, for tests of engines."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser


def one_if(then: str = "a = MatMul(x, w)", before: str = "", batch: str = "2") -> str:
    """The smallest model with a conditional, as text."""
    return f"""<ir_version: 10, opset_import: ["": 20, "other": 1]>
    g (float[{batch}, 8] x, bool c) => (float[{batch}, 8] y) <float[8, 8] w = {{{", ".join(["0.5"] * 64)}}}> {{
      {before}
      y = If (c) <then_branch = compute () => (float[{batch}, 8] a) {{ {then} }},
                  else_branch = reuse () => (float[{batch}, 8] b) {{ b = Identity(x) }}>
    }}"""


def written(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path
