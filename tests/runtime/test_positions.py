"""Inputs beside the latents, told by what was returned for them."""

from __future__ import annotations

import numpy as np
import pytest

from lazy_compile.runtime.fingerprint import Floats
from lazy_compile.runtime.positions import SPARE, Position, Returned, Trajectory

CALLS = 3


def drawn(size: int, seed: int) -> Floats:
    values = np.random.default_rng(seed).normal(size=size)
    return np.append(values, np.linalg.norm(values))


def position(size: int) -> Position:
    """Of a step at which the model was called for three streams."""
    returned = [Returned({}, 0, {"sound": drawn(size, 10 + number)}) for number in range(CALLS)]
    return Position(Trajectory(), 0, 500.0, None, returned=returned)


def followed(size: int) -> Floats:
    """The next step from ``drawn(size, 0)``, guided."""
    values = drawn(size, 0)[:-1] + sum(0.1 * (number + 1) * drawn(size, 10 + number)[:-1] for number in range(CALLS))
    return np.append(values, np.linalg.norm(values))


@pytest.mark.parametrize("size", [1 + CALLS + SPARE, 500])
def test_what_follows_is_told_from_what_does_not(size: int) -> None:
    assert position(size).moves("sound", drawn(size, 0), followed(size))
    assert not any(position(size).moves("sound", drawn(size, 0), drawn(size, seed)) for seed in range(20, 220))
    assert not position(size).moves("video", drawn(size, 0), followed(size))
    assert not position(size).moves("sound", drawn(size + 1, 0), followed(size))
    assert not position(size).moves("sound", drawn(size, 0), np.full_like(followed(size), np.nan))


@pytest.mark.parametrize("size", [CALLS + SPARE, 5])
def test_too_few_numbers_tell_nothing(size: int) -> None:
    assert not position(size).moves("sound", drawn(size, 0), followed(size))
