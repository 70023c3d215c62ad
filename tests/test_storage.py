"""What is removed, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazy_compile.storage import remove_files

ENGINE = ["m.engine", "m.engine.json"]


@pytest.mark.parametrize("names", [ENGINE, ENGINE[::-1]])
def test_a_file_is_removed_before_what_describes_it(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends in between leaves no engine without its description."""
    for name in names:
        (tmp_path / name).touch()
    seen, unlink = [], Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        seen.append(sorted(file.name for file in tmp_path.iterdir()))

    monkeypatch.setattr(Path, "unlink", watched)
    remove_files(tmp_path, names)
    assert seen == [["m.engine.json"], []]
