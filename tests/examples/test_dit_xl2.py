"""The experiment of the paper, on a pipeline of the same classes that is small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from lazy_compile.runtime.artifact import MANIFEST
from support.diffusers_pipelines import dit

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "dit_xl2_imagenet" / "run.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dit_xl2_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dit_xl2_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit_xl2")
    dit().pipe.save_pretrained(folder / "pipeline")
    (folder / "reference").mkdir()
    pixels = torch.randint(0, 255, (8, 12, 10, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / "reference" / f"{number}.png")
    return folder


@pytest.mark.slow
def test_one_command_from_a_pipeline_to_the_table(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folders / "pipeline", "--reference", folders / "reference", "--output", tmp_path, "--device", "cpu"]
    words += ["--steps", 4, "--ratios", 0, 0.5, "--samples", 12, "--batch", 4, "--iterations", 0]
    words += ["--extractors", "support.features:extractors"]
    assert example.main([str(word) for word in words]) == 0
    dense, lazy = json.loads((tmp_path / "table.json").read_text())
    assert (dense["lazy_ratio"], dense["compute_ratio"]) == (0.0, 1.0)
    assert lazy["lazy_ratio"] == pytest.approx(0.5, abs=0.13)
    assert lazy["compute_ratio"] < 1.0
    assert dense["fid"] > 0
    assert dense["fid"] != lazy["fid"]
    assert len(list((tmp_path / "steps4_lazy50").glob("*.png"))) == 4
    assert (tmp_path / "steps4_lazy50" / "gates" / MANIFEST).is_file()
    assert "| steps | reused | MACs | FID | IS | paper's FID |" in capsys.readouterr().out


def test_the_paper_stands_beside_its_own_settings(example: ModuleType) -> None:
    assert example.PAPER[50, 50] == (2.70, 237.0)
    row = example.Row(50, 0.5, 0.52, 3.0, 230.0, *example.PAPER[50, 50])
    options = example.parser().parse_args(["x", "--reference", "y"])
    assert "| 50 | 50% | 52% | 3.00 | 230.0 | 2.7 | 237.0 |" in example.table([row], options)


def test_without_weights_it_says_where_they_are(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = example.main([str(tmp_path / "DiT-XL-2-256"), "--reference", str(tmp_path), "--device", "cpu"])
    assert code == 5
    assert "hf download facebook/DiT-XL-2-256 --local-dir" in capsys.readouterr().err


def test_an_empty_reference_is_refused(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folders / "pipeline"), "--reference", str(tmp_path), "--device", "cpu"]
    assert example.main([*words, "--extractors", "support.features:extractors"]) == 2
    assert "holds 0 images; give the folder of the ImageNet images" in capsys.readouterr().err
