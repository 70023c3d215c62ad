"""What tests of captures share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lazy_compile.capture.captured import Capture
from support.kept_models import call, kept_capture, toy


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls of torch.export so far."""
    calls: list[object] = []
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return calls


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Capture]:
    """A folder with the capture of a toy, and that capture."""
    folder = tmp_path_factory.mktemp("captures")
    return folder, kept_capture(toy(), call(), folder)


@pytest.fixture
def folder(kept: tuple[Path, Capture], tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(kept[0], tmp_path / "captures")
    return tmp_path / "captures"
