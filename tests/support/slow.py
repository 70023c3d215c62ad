"""Which cases of a test run at every change, and which with ``make test-slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(every_run: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """``cases`` as parameters of a test; those not in ``every_run`` are marked slow.

    Raises:
        AssertionError: ``every_run`` names something that is no case.
    """
    cases = list(cases)
    assert all(case in cases for case in every_run), f"{every_run} are not all among {cases}"
    return [_param(case, () if case in every_run else pytest.mark.slow) for case in cases]


def _param(case: Any, marks: Any) -> Any:
    return pytest.param(*case, marks=marks) if isinstance(case, tuple) else pytest.param(case, marks=marks)
