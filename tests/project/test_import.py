"""`import lazy_compile` costs torch and nothing heavier."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["onnx", "onnxruntime", "onnxscript", "diffusers", "tensorrt", "sklearn", "matplotlib", "torchmetrics"]


def heavy_modules_after(statement: str) -> list[str]:
    code = f"import sys, json; {statement}; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout)
    return loaded


def test_import_loads_no_heavy_dependency() -> None:
    assert heavy_modules_after("import lazy_compile") == []


def test_a_heavy_dependency_is_seen() -> None:
    assert heavy_modules_after("import lazy_compile, onnx, matplotlib") == ["onnx", "matplotlib"]
