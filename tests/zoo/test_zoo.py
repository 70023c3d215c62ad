"""Every check for every model of the zoo; a few models of different structure run with ``make test``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazy_compile.errors import LazyCompileError
from zoo.checks import CHECKS, batch
from zoo.exceptions import FAILING
from zoo.golden import FOLDER
from zoo.registry import zoo
from zoo.subject import BATCH, Subject, subject

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers, about names of its own

EVERY_RUN = (
    "SanaTransformer2DModel",  # linear attention, convolutional MLP
    "WanTransformer3DModel",  # the skip is seen through casts
)


EXPORTED_EVERY_RUN = ("motif-streams-list", "motif-streams-packed", "WanTransformer3DModel")


def _cases() -> list[object]:
    """Sorted by model, so that each is captured once."""
    cases = []
    for name in zoo():
        for check in CHECKS if "captures" not in FAILING.get(name, {}) else ["captures"]:
            marks = (
                [] if name in (EXPORTED_EVERY_RUN if check in ("onnx", "sizes") else EVERY_RUN) else [pytest.mark.zoo]
            )
            if reason := FAILING.get(name, {}).get(check):
                marks.append(pytest.mark.xfail(raises=(AssertionError, LazyCompileError), reason=reason, strict=True))
            cases.append(pytest.param(name, check, id=f"{name}-{check}", marks=marks))
    return cases


@pytest.mark.parametrize(("name", "check"), _cases())
def test_zoo(name: str, check: str) -> None:
    if check == "batch":
        _hold_for_any_gates(subject(name))
    else:
        CHECKS[check](subject(name))


def _hold_for_any_gates(model: Subject) -> None:
    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 1000), st.sampled_from(["last", "linear"]), st.permutations(range(BATCH)))
    def holds(seed: int, reuse: str, order: list[int]) -> None:
        batch(model, seed, reuse, tuple(order))

    holds()


def test_every_golden_text_belongs_to_a_model() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} <= set(zoo())
