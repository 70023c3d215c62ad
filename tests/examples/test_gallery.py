"""Every example of the gallery, copied to an empty folder and started there."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "examples" / "gallery"
EXAMPLES = sorted(file.name for file in GALLERY.glob("*.py"))
MARKS = {"torchao_int8.py": [pytest.mark.torchao]}
LONGER = [
    "accelerate_launch.py", "engine.py", "nvidia_modelopt.py", "onnx_runtime.py", "polygraphy_run.py",
    "torch_compile.py", "trained_gates.py",
]  # fmt: skip
"""What they show has tests of its own, in ``integrations``, ``backends`` and ``calibration``."""
MARKS |= {name: [pytest.mark.slow] for name in LONGER}
SAYS = {"accelerate_launch.py": "4 images from 2 processes"}


@pytest.mark.filterwarnings("ignore")  # of the hosts
@pytest.mark.parametrize("example", [pytest.param(name, marks=MARKS.get(name, [])) for name in EXAMPLES])
def test_an_example_is_exact_and_then_lazy(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    runpy.run_path(shutil.copy(GALLERY / example, tmp_path), run_name="__main__")
    said = capsys.readouterr().out
    assert "equal while nothing is reused: True" in said
    assert SAYS.get(example, "") in said
    ratio = re.search(r"lazy ratio (0\.\d+)", said)
    assert ratio is not None
    assert 0.2 < float(ratio[1]) < 0.8


def test_the_page_names_every_example() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert sorted(set(re.findall(r"examples/gallery/(\w+\.py)", page))) == EXAMPLES
