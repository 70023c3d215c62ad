from __future__ import annotations

import pytest

from lazy_compile.planning import search


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last comparison of a search takes two batches."""
    monkeypatch.setattr(search, "FINAL_SAMPLES", 8)
