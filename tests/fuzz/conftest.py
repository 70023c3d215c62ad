"""The model and the conversions of all tests here, made once; what stands in for slow parts ends with each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz.artefacts import Workshop


@pytest.fixture(scope="session")
def _workshop() -> Workshop:
    return Workshop.of_small()


@pytest.fixture(scope="module")
def shop(_workshop: Workshop) -> Iterator[Workshop]:
    with _workshop.open():
        yield _workshop
