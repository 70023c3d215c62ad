"""The artefacts of all tests here, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz.artefacts import Workshop, workshop


@pytest.fixture(scope="session")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made
