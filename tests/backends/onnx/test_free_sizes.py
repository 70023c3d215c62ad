"""One file for many sizes, against PyTorch over whole trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Learned, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.example import example_call
from lazy_compile.backends.onnx.export import OnnxReport, export_onnx
from lazy_compile.backends.onnx.free_sizes import FreeSizes
from lazy_compile.backends.onnx.sizes import ShapeRange, holds
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ConfigError
from support.layers import MLP, WIDTH, Attention, norm, sinusoid
from support.lowering import knots, random_gates
from support.toy_models import TOYS, Toy, call, trajectory

TOLERANCE = 1e-4

Dynamic = tuple[LazyModule, Path, OnnxReport]


def _dynamic(toy: str, folder: Path) -> Dynamic:
    lazy = lazy_compile.transform(TOYS[toy].model(), call(TOYS[toy]), batch_rule="all_reuse")
    path = folder / f"{toy}.onnx"
    return lazy, path, export_onnx(lazy, path, dynamic=True)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Dynamic:
    return _dynamic("mmdit", tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dynamic:
    return _dynamic("dit", tmp_path_factory.mktemp("images"))


def of_size(toy: str, **shapes: tuple[int, ...]) -> Toy:
    return replace(TOYS[toy], shapes={**TOYS[toy].shapes, **shapes})


def follow(lazy: LazyModule, denoiser: EngineDenoiser, toy: Toy, batch: int, steps: int = 6) -> float:
    """The largest difference over a trajectory; the decisions are the same."""
    largest = 0.0
    for model in (lazy, denoiser):
        model.reset_stats()
    for arguments in trajectory(toy, batch, steps=steps):
        with torch.no_grad():
            expected = lazy(**arguments)
        largest = max(largest, float((denoiser(**arguments) - expected).abs().max()))
    np.testing.assert_array_equal(denoiser.stats.reuse_table, lazy.stats.reuse_table)
    return largest


def test_one_file_serves_every_batch_and_length(tokens: Dynamic) -> None:
    lazy, path, report = tokens
    assert report.sizes == {"batch": 2, "tokens": 16, "text_1": 5}
    assert (report.if_nodes, report.heavy_ops_outside_if) == (5, ())
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
    for policy in (
        Scheduled(CacheSchedule.random(0.5, 6, len(lazy.branches), seed=0)),
        Learned(random_gates(lazy, knots(6))),
    ):
        lazy.policy = denoiser.policy = policy
        for batch, length, words in ((1, 16, 5), (2, 12, 7), (3, 8, 5), (2, 16, 3), (5, 20, 9)):
            toy = of_size("mmdit", x=(length, 8), text=(words, 8))
            assert follow(lazy, denoiser, toy, batch) < TOLERANCE, (batch, length, words)
            assert 0.1 < denoiser.stats.lazy_ratio < 0.9


def test_one_file_serves_every_resolution(images: Dynamic) -> None:
    lazy, path, report = images
    assert report.sizes == {"batch": 2, "height": 8, "width": 8}
    assert "3, fixed in forward, toy_networks.py:" in report.fixed_sizes["x.1"]
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
    lazy.policy = denoiser.policy = Scheduled(CacheSchedule.random(0.5, 6, len(lazy.branches), seed=1))
    for batch, height, width in ((1, 8, 8), (2, 6, 10), (3, 16, 8), (2, 4, 4), (1, 12, 20)):
        assert follow(lazy, denoiser, of_size("dit", x=(3, height, width)), batch) < TOLERANCE


def test_a_batch_that_shrinks_goes_on_with_its_own_rows(tokens: Dynamic) -> None:
    lazy, path, _ = tokens
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
    lazy.policy = denoiser.policy = Scheduled(CacheSchedule.every(4, 8, len(lazy.branches)))
    calls = trajectory(TOYS["mmdit"], 3, steps=8)
    last_rows = [{name: value[1:] for name, value in arguments.items()} for arguments in calls]
    for model in (lazy, denoiser):
        model.reset()
        model.reset_stats()
    for arguments in [*calls[:6], *last_rows[6:]]:
        with torch.no_grad():
            expected = lazy(**arguments)
        torch.testing.assert_close(denoiser(**arguments), expected, atol=TOLERANCE, rtol=0)
    assert denoiser.stats.reuse_table[:, 0].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]


def test_other_sizes_start_a_trajectory_and_memory_is_used_again(tokens: Dynamic) -> None:
    _, path, _ = tokens
    runner = OnnxRunner(path, threads=1)
    first, second = call(TOYS["mmdit"]), call(of_size("mmdit", x=(12, 8)))
    stream = runner.new_stream()
    runner.run(first, force="reuse", stream=stream)
    addresses = {pair[0].data_ptr() for pair in stream.buffers.values()}
    runner.run(second, force="reuse", stream=stream)
    assert runner.decisions.all(), "nothing is cached for these sizes"
    runner.run(first, force="reuse", stream=stream)
    assert runner.decisions.all()
    assert addresses & {item.data_ptr() for pair in stream.buffers.values() for item in pair}


def test_sizes_may_be_chosen_by_name_or_range(tokens: Dynamic, tmp_path: Path) -> None:
    lazy, _, _ = tokens
    example = call(TOYS["mmdit"])
    with pytest.raises(ConfigError, match="no size 'height' can be left free; those that can: batch, tokens, text_1"):
        export_onnx(lazy, tmp_path / "m.onnx", example, dynamic=("height",))
    shapes = ShapeRange(min={"x": (1, 16, 8)}, max={"x": (4, 16, 8)})
    report = export_onnx(lazy, tmp_path / "m.onnx", example, shapes=shapes)
    assert report.sizes == {"batch": 2}
    (size,) = OnnxRunner(tmp_path / "m.onnx", threads=1).metadata.sizes
    assert (size.least, size.most) == (1, 4)
    with pytest.raises(ConfigError, match="input 'x' is float32"):
        OnnxRunner(tmp_path / "m.onnx", threads=1).run(call(of_size("mmdit", x=(12, 8))), force="compute")


class Asks(nn.Module):
    """Attention over tokens, behind a question about their number."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.ask, self.attn, self.mlp = ask, Attention(), MLP()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * self.ask(x) + sinusoid(t, WIDTH)[:, None]
        x = x + self.attn(norm(x))
        return x + self.mlp(norm(x))


def sizes_of(ask: Callable[[Tensor], Any]) -> FreeSizes:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 16, WIDTH), "t": torch.full((2,), 500.0)}
    graph, tensors = example_call(lazy_compile.transform(Asks(ask).eval(), inputs), inputs)
    return FreeSizes.of(graph, tensors, True, None, frozenset(), ())


def test_a_size_that_the_model_pins_is_fixed_and_its_line_named() -> None:
    sizes = sizes_of(lambda x: 2.0 if x.shape[1] // 2 == 8 else 3.0)
    assert sizes.example == {"batch": 2}
    assert sizes.fixed["x.1"].startswith("16, fixed in ")


def test_what_the_model_asks_about_a_size_is_a_condition() -> None:
    sizes = sizes_of(lambda x: 2.0 if x.shape[1] > 8 else 3.0)
    assert sizes.example == {"batch": 2, "tokens": 16}
    for tokens, expected in ((12, True), (4, False)):
        assert all(holds(text, {"batch": 2, "tokens": tokens}) for text in sizes.conditions) is expected, tokens
