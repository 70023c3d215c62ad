"""Operators that the ONNX exporter or ONNX Runtime does not know, each in a branch of a small model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import BackendError
from support.layers import TOKENS, WIDTH, norm
from support.slow import slow_but
from support.small_model import SMALL, Small, Wraps, run
from support.toy_models import call, randomize

HEADS = 4


class Attends(Small, ABC):
    """Its attention is ``attend(q, k, v)`` with ``float[batch, heads, tokens, channels]``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def blocks(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(norm(h)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(norm(h))

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """To be written out."""


class OverThreeAxes(Attends):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        folded = [item.flatten(0, 1) for item in (q, k, v)]
        return scaled_dot_product_attention(*folded, mask).unflatten(0, q.shape[:2])


class OverFiveAxes(Attends):
    """In windows of half the tokens, with a mask for each row."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (item.unflatten(2, (2, -1)).transpose(1, 2) for item in (q, k, v))
        mask = (q.mean(dim=-1, keepdim=True) > k.mean(dim=-1).unsqueeze(-2)).any(dim=2, keepdim=True)
        return scaled_dot_product_attention(q, k, v, mask | torch.eye(TOKENS // 2).bool()).transpose(1, 2).flatten(2, 3)


class Flexible(Attends):
    """A mask and a bias written as Python functions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cpu")
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - 0.1 * h * (i - j), block_mask=blocks)


class ChoosesBooleans(Attends):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() < 3
        rising = q.mean(dim=(1, 3))[:, None, :, None] > k.mean(dim=(1, 3))[:, None, None]
        mask = torch.where(rising, near, ~near).masked_fill(torch.eye(TOKENS).bool(), True)
        return scaled_dot_product_attention(q, k, v, mask)


class MasksWholeRows(Attends):
    """The first token of each row may look at nothing: torch gives it zeros."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1).expand(q.shape[0], 1, tokens, tokens)
        return scaled_dot_product_attention(q, k, v, mask)


def test_whoever_may_look_at_nothing_gets_nothing(tmp_path: Path) -> None:
    assert agrees(captured(MasksWholeRows(), call(SMALL)), call(SMALL), tmp_path, dynamic=True)


class Factorises(Small):
    """Its MLP is followed by the orthogonal factor of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def blocks(self, h: Tensor) -> Tensor:
        return super().blocks(h) + self.mlp(norm(h) @ torch.linalg.qr(self.basis + 1e-8)[0])


class Merges(Small):
    """Averages tokens into others, as token merging does; some of those were none of them before."""

    def blocks(self, h: Tensor) -> Tensor:
        into = (torch.arange(TOKENS) % 3)[None, :, None].expand_as(h)
        merged = h.scatter_reduce(1, into, self.mlp(norm(h)), "mean")
        return h + self.mlp(merged.scatter_reduce(1, into, norm(h), "mean", include_self=False))


def captured(model: nn.Module, arguments: dict[str, Any]) -> LazyModule:
    return lazy_compile.transform(randomize(model).eval(), arguments)


def agrees(lazy: LazyModule, arguments: dict[str, Any], folder: Path, *, dynamic: bool = False) -> bool:
    """ONNX Runtime gives what PyTorch gives, with and without reuse."""
    lazy_compile.export_onnx(lazy, folder / "m.onnx", arguments, dynamic=dynamic)
    denoiser = EngineDenoiser(OnnxRunner(folder / "m.onnx", threads=1))
    lazy.policy = denoiser.policy = Scheduled(CacheSchedule.every(2, 4, len(lazy.branches)))
    calls = [arguments | {"x": arguments["x"] * (1 - 0.1 * step)} for step in range(4)]
    return all(
        torch.allclose(seen, expected, atol=1e-4)
        for seen, expected in zip(run(denoiser, calls), run(lazy, calls), strict=True)
    )


EVERY_RUN = [OverFiveAxes, Flexible, Factorises, Merges]


@pytest.mark.parametrize("model", slow_but(EVERY_RUN, [*EVERY_RUN, OverThreeAxes, ChoosesBooleans]))
def test_an_operator_in_terms_of_others(model: type[nn.Module], tmp_path: Path) -> None:
    assert agrees(captured(model(), call(SMALL)), call(SMALL), tmp_path)


class Rotates(Wraps):
    """Takes a table of complex numbers."""

    def forward(self, x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return self.small(torch.view_as_real(pairs * table).flatten(-2), t)


def test_a_complex_input_is_taken_in_pairs(tmp_path: Path) -> None:
    table = torch.polar(torch.ones(TOKENS, WIDTH // 2), torch.arange(TOKENS * WIDTH // 2).float().reshape(TOKENS, -1))
    arguments = {**call(SMALL), "table": table}
    assert agrees(captured(Rotates(), arguments), arguments, tmp_path)


class ScattersSome(Wraps):
    """Adds to tokens as many words as there are places for them."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, into: Tensor) -> Tensor:
        return self.small(x.scatter_add(1, into[..., None].expand(-1, -1, WIDTH), words), t)


def test_an_index_that_is_shorter_than_what_is_scattered(tmp_path: Path) -> None:
    given = call(replace(SMALL, shapes={**SMALL.shapes, "words": (5, WIDTH)}))
    given["into"] = torch.arange(3).expand(len(given["x"]), 3).contiguous()
    assert agrees(captured(ScattersSome(), given), given, tmp_path, dynamic=True)


class Repeats(Wraps):
    """Each frame meets each word: both are repeated as often as there are of the others."""

    def forward(self, x: Tensor, t: Tensor, frames: Tensor, words: Tensor) -> Tensor:
        pairs = frames.repeat_interleave(words.shape[1], dim=1) * words.repeat(1, frames.shape[1], 1)
        return self.small(x + pairs.cumsum(dim=1).mean(dim=1, keepdim=True), t)


def test_a_free_number_of_repeats(tmp_path: Path) -> None:
    def arguments(frames: int, words: int) -> dict[str, Tensor]:
        toy = replace(SMALL, shapes={**SMALL.shapes, "frames": (frames, WIDTH), "words": (words, WIDTH)})
        return call(toy)

    lazy = captured(Repeats(), arguments(3, 5))
    report = lazy_compile.export_onnx(lazy, tmp_path / "m.onnx")
    assert {"frames_1", "words_1"} <= set(report.sizes)
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx", threads=1))
    for given in (arguments(3, 5), arguments(4, 4)):
        assert torch.allclose(*run(denoiser, [given]), *run(lazy, [given]), atol=1e-4)


class DropsWords(Wraps):
    """Adds the mean of the words that a mask keeps: how many there are depends on values."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        kept = [row[torch.nonzero(keep).flatten()].mean(dim=0) for row, keep in zip(words, mask, strict=True)]
        return self.small(x + torch.stack(kept)[:, None], t)


def words(kept: int) -> dict[str, Any]:
    arguments = call(SMALL)
    rows = len(arguments["x"])
    mask = torch.arange(5).expand(rows, 5) < kept
    return {**arguments, "words": torch.ones(rows, 5, WIDTH) * torch.arange(5)[:, None], "mask": mask}


def test_sizes_that_depend_on_values_are_those_of_the_example(tmp_path: Path) -> None:
    lazy = captured(DropsWords(), words(3))
    assert lazy.graph.captured.has_open_sizes
    lazy.capture(**words(4))
    assert len(lazy._store.graphs) == 1
    with pytest.raises(BackendError, match="give example_inputs"):
        lazy_compile.export_onnx(lazy, tmp_path / "m.onnx")
    assert agrees(lazy, words(3), tmp_path)
