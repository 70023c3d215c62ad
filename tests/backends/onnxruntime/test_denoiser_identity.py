"""An exported model keeps the caches of a batch to the rows that filled them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import OnnxReport
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from support.layers import TOKENS, WIDTH, WORDS

STEPS = 6
Exported = Callable[[str, str], tuple[LazyModule, Path, OnnxReport]]


@pytest.fixture(scope="module")
def engine(exported: Exported) -> tuple[EngineDenoiser, Any]:
    lazy, path, _ = exported("cross", "last")
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
    denoiser.policy = Scheduled(CacheSchedule.every(3, STEPS, len(lazy.branches)))
    return denoiser, lazy.original


class Sample:
    """One row: its noise, its text, and how far it is."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(TOKENS, 8, generator=generator)
        self.text = torch.randn(WORDS, WIDTH, generator=generator)
        self.step = 0


@torch.no_grad()
def advance(model: Any, *samples: Sample) -> Tensor:
    """One step of a batch of two; returns what the model returned."""
    times = torch.tensor([900.0 - 150.0 * sample.step for sample in samples])
    inputs = {"x": torch.stack([each.x for each in samples]), "timestep": times}
    output: Tensor = model(**inputs, text=torch.stack([each.text for each in samples]))
    for sample, v in zip(samples, output, strict=True):
        sample.x, sample.step = sample.x - 0.15 * v, sample.step + 1
    return output


def alone(engine: EngineDenoiser, *seeds: int) -> list[Tensor]:
    engine.reset()
    samples = [Sample(seed) for seed in seeds]
    return [advance(engine, *samples) for _ in range(STEPS)]


def test_batches_in_any_order_keep_their_caches(engine: tuple[EngineDenoiser, Any]) -> None:
    denoiser, _ = engine
    expected = [iter(alone(denoiser, first, second)) for first, second in ((1, 2), (3, 4), (5, 6))]
    denoiser.reset()
    denoiser.reset_stats()
    batches = [[Sample(first), Sample(second)] for first, second in ((1, 2), (3, 4), (5, 6))]
    order = [number for number in range(3) for _ in range(STEPS)]
    random.Random(0).shuffle(order)
    for number in order:
        assert torch.equal(advance(denoiser, *batches[number]), next(expected[number]))
    assert denoiser.stats.lazy_ratio == pytest.approx(2 / 3)


def _swap(samples: list[Sample]) -> list[Sample]:
    return samples[::-1]


def _replace(samples: list[Sample]) -> list[Sample]:
    return [samples[0], Sample(9)]


def test_a_batch_whose_rows_swapped_goes_on(engine: tuple[EngineDenoiser, Any]) -> None:
    denoiser, _ = engine
    expected = alone(denoiser, 1, 2)
    denoiser.reset()
    samples = [Sample(1), Sample(2)]
    for _ in range(4):
        advance(denoiser, *samples)
    assert torch.allclose(advance(denoiser, *_swap(samples)), expected[4].flip(0), atol=1e-5)


@pytest.mark.parametrize("change", [_replace])
def test_a_batch_whose_rows_changed_computes(
    engine: tuple[EngineDenoiser, Any], change: Callable[[list[Sample]], list[Sample]]
) -> None:
    denoiser, original = engine
    denoiser.reset()
    samples = [Sample(1), Sample(2)]
    for _ in range(4):  # the step that follows would reuse
        advance(denoiser, *samples)
    samples = change(samples)
    copies = [_copy(sample) for sample in samples]
    expected = advance(original, *copies)
    assert torch.allclose(advance(denoiser, *samples), expected, atol=1e-4, rtol=1e-4)


def _copy(sample: Sample) -> Sample:
    copy = Sample(0)
    copy.x, copy.text, copy.step = sample.x, sample.text, sample.step
    return copy


def test_what_is_not_finite_is_never_reused_again(engine: tuple[EngineDenoiser, Any]) -> None:
    denoiser, original = engine
    denoiser.reset()
    samples = [Sample(1), Sample(2)]
    advance(denoiser, *samples)
    kept = [sample.x for sample in samples]
    for stream in _streams(denoiser):
        for pair in stream.buffers.values():
            if pair[0].is_floating_point():
                pair[0].fill_(float("nan"))
    assert advance(denoiser, *samples).isnan().any()
    for sample, x in zip(samples, kept, strict=True):  # the host recovers, and goes on
        sample.x = 0.98 * x
    copies = [_copy(sample) for sample in samples]
    expected = advance(original, *copies)
    assert torch.allclose(advance(denoiser, *samples), expected, atol=1e-4, rtol=1e-4)


def _streams(denoiser: EngineDenoiser) -> Iterator[Any]:
    return iter(list(denoiser.runner.streams))
