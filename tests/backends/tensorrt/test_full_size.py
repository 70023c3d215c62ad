"""One model of full size: DiT-XL/2, 28 blocks, 256 tokens, batch 2. How long it takes to build, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SECONDS, GIGABYTES = 180, 8

EXPORT = """
import sys, torch, lazy_compile
from diffusers import DiTTransformer2DModel
from lazy_compile.backends.onnx.export import export_onnx
torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
    patch_size=2, num_embeds_ada_norm=1000,
).eval().half()
inputs = {
    "hidden_states": torch.randn(2, 4, 32, 32).half(), "timestep": torch.tensor([500, 500]),
    "class_labels": torch.tensor([1, 2]),
}
lazy = lazy_compile.transform(model, inputs)
if sys.argv[2] == "schedule":
    table = torch.ones(3, 56, dtype=torch.bool)
    table[2] = torch.arange(56) % 4 < 2  # every second block
    lazy.policy = lazy_compile.Scheduled(lazy_compile.CacheSchedule(table.numpy()))
export_onnx(lazy, sys.argv[1], gating=sys.argv[2])
"""

BUILD = """
import json, resource, sys
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.build import build_engine
report = build_engine(sys.argv[1], sys.argv[2], BuildConfig(flavor="rtx"))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"seconds": report.seconds, "gigabytes": used, "bytes": report.bytes, **report.structure.summary()}))
"""


BUILD_ALL = """
import json, resource, sys
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.build import build_engines
reports = build_engines(sys.argv[1], sys.argv[2], BuildConfig(flavor="rtx"))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({
    "seconds": [report.seconds for report in reports], "bytes": [report.bytes for report in reports],
    "gigabytes": used, "structures": [report.structure.summary() for report in reports],
}))
"""


def in_a_process_of_its_own(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["predicate", "input"])
def test_dit_xl_2_is_built_in_three_minutes_and_eight_gigabytes(gating: str, tmp_path: Path) -> None:
    in_a_process_of_its_own(EXPORT, tmp_path / "m.onnx", gating)
    answer = in_a_process_of_its_own(BUILD, tmp_path / "m.onnx", tmp_path / "m.engine")
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    print(found)
    assert found["problems"] == []
    assert (found["branches"], found["host_copies"], found["fused_attention"]) == (56, 56, 28)
    assert found["host_copies_before_first_branch"] == (1 if gating == "predicate" else 56)
    assert found["heavy_inside"] == 28 * 5  # query, key and value in one; attention; and three projections
    assert found["seconds"] < SECONDS
    assert found["gigabytes"] < GIGABYTES


@pytest.mark.slow
def test_a_schedule_of_dit_xl_2_has_no_jump_and_half_the_kernels_where_half_is_reused(tmp_path: Path) -> None:
    in_a_process_of_its_own(EXPORT, tmp_path / "onnx", "schedule")
    answer = in_a_process_of_its_own(BUILD_ALL, tmp_path / "onnx", tmp_path / "engines")
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    print(found)
    dense, half = found["structures"]
    for structure in (dense, half):
        assert (structure["branches"], structure["host_copies"], structure["problems"]) == (0, 0, [])
    assert (dense["fused_attention"], half["fused_attention"]) == (28, 14)
    assert dense["heavy_always"] - half["heavy_always"] == 14 * 5
    assert max(found["seconds"]) < SECONDS
    assert found["gigabytes"] < GIGABYTES
