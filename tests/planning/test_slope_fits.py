"""Slopes from what a dense trajectory computed, against a search for them by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lazy_compile import CacheSchedule, LazyModule, Scheduled, export_onnx
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.planning import slope_fits
from lazy_compile.planning.replay import replayable, run_trajectory
from lazy_compile.planning.slope_fits import OutputSamples, SlopeFits
from lazy_compile.runtime.cache import extrapolation_weights
from support.sampling import STEPS, lazy_tiny_dit, sample

TABLE = np.zeros((STEPS, 4), dtype=bool)
TABLE[[0, 1, 2, 4]] = True
TABLE[[3, 5], 2] = [True, False]


def fits(denoiser: Any, order: int) -> SlopeFits:
    samples = OutputSamples()
    dense = CacheSchedule.always_compute(STEPS, 4)
    run_trajectory(replayable(denoiser), sample, 0, dense, on_call=lambda call: samples.add(call.step, call.computed()))
    return SlopeFits(samples.inner_products(4, STEPS), order)


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_tiny_dit()


def random_fits(order: int, noise: float) -> tuple[torch.Tensor, SlopeFits]:
    """Outputs ``[STEPS, N]`` of four branches that bend, and their fits."""
    draw = torch.Generator().manual_seed(1)
    times = torch.arange(STEPS, dtype=torch.float64)[:, None]
    first, second, third = (torch.randn(64, generator=draw, dtype=torch.float64) for _ in range(3))
    outputs = first + times * second + 0.1 * times**2 * third
    outputs = outputs + noise * torch.randn(outputs.shape, generator=draw, dtype=torch.float64)
    inner = (outputs @ outputs.T).numpy()
    return outputs, SlopeFits(np.repeat(inner[None], 4, axis=0), order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_slope_misses_less(order: int) -> None:
    outputs, fitted = random_fits(order, 0.5)
    slopes = fitted.slopes(TABLE)
    assert (slopes[TABLE] == 1).all()
    for step, branch in np.argwhere(~TABLE):
        latest, *before = np.flatnonzero(TABLE[:step, branch])[::-1][: order + 1]
        weights = extrapolation_weights(np.array([step]), np.array([latest]), np.array(before)[:, None])[:, 0]
        line = sum(weight * (outputs[each] - outputs[latest]) for weight, each in zip(weights, before, strict=True))

        def miss(slope: float, line: Any = line, step: int = step, latest: int = latest) -> float:
            return float((outputs[step] - outputs[latest] - slope * line).square().sum())

        others = [slopes[step, branch] + moved for moved in (-0.01, 0.01)]
        assert miss(slopes[step, branch]) < min(map(miss, others))


def test_outputs_on_a_line_are_followed_all_the_way_and_constant_ones_too() -> None:
    times = np.arange(STEPS, dtype=np.float64)[:, None]
    for outputs in (1.0 + times * np.ones(8), np.ones((STEPS, 8))):
        inner = np.repeat((outputs @ outputs.T)[None], 4, axis=0)
        assert SlopeFits(inner, 1).slopes(TABLE) == pytest.approx(np.ones(TABLE.shape))


def test_what_never_computed_has_no_slope(lazy: LazyModule) -> None:
    samples = OutputSamples()
    samples.add(0, {1: [torch.ones(3)]})
    assert (SlopeFits(samples.inner_products(4, STEPS), 1).slopes(TABLE) == 1).all()


def test_an_engine_computes_what_the_model_does(lazy: LazyModule, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("engine") / "dit.onnx"
    export_onnx(lazy, path, gating="input", dynamic=False)
    engine = EngineDenoiser(OnnxRunner(path, threads=1), lazy.policy)
    seen, expected = fits(engine, 1), fits(lazy, 1)
    assert np.isfinite(expected.inner).all()
    assert seen.inner == pytest.approx(expected.inner, rel=1e-4)


def test_a_few_elements_say_nearly_the_same(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fits(lazy, 1).slopes(TABLE)
    monkeypatch.setattr(slope_fits, "ELEMENTS", 256)
    slope_fits._places.cache_clear()
    seen = fits(lazy, 1).slopes(TABLE)
    slope_fits._places.cache_clear()
    assert not np.array_equal(seen, expected)
    assert seen == pytest.approx(expected, abs=0.2)


def test_fitted_slopes_change_samples_less(lazy: LazyModule) -> None:
    slopes = fits(lazy, 1).slopes(TABLE)
    dense = sample(lazy.original, 7)

    def error(schedule: CacheSchedule) -> float:
        lazy.policy = Scheduled(schedule)
        return float((sample(lazy, 7) - dense).square().mean())

    assert error(CacheSchedule(TABLE, slopes)) < 0.9 * error(CacheSchedule(TABLE))
