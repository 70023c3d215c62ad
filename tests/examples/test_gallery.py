"""Every example of the gallery, as a user would start it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "examples" / "gallery"
EXAMPLES = sorted(file.name for file in GALLERY.glob("*.py") if file.name != "components.py")
MARKS = {"torchao_int8.py": [pytest.mark.torchao]}
SAYS = {"accelerate_launch.py": "4 images from 2 processes"}


@pytest.mark.filterwarnings("ignore")  # of the hosts
@pytest.mark.parametrize("example", [pytest.param(name, marks=MARKS.get(name, [])) for name in EXAMPLES])
def test_an_example_is_exact_and_then_lazy(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(GALLERY)
    torch.compiler.reset()
    runpy.run_path(str(GALLERY / example), run_name="__main__")
    said = capsys.readouterr().out
    assert "equal while nothing is reused: True" in said
    assert SAYS.get(example, "") in said
    ratio = re.search(r"lazy ratio (0\.\d+)", said)
    assert ratio is not None
    assert 0.2 < float(ratio[1]) < 0.8


def test_the_page_names_every_example() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert sorted(set(re.findall(r"examples/gallery/(\w+\.py)", page)) - {"components.py"}) == EXAMPLES
