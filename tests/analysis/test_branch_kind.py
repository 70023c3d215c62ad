"""What a branch is called: products of activations that are an attention, and those that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support.published_model import lazily, mlp

WIDTH, FRAMES, PLACES = 16, 3, 4


class Block(nn.Module):
    """``x + out(way(...))``, where a way is given the block, its normed tokens and an embedded time."""

    def __init__(self, way: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.make, self.weigh, self.mlp = nn.Linear(WIDTH, 2 * WIDTH * 8), nn.Linear(WIDTH, 3), mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.out(self.way(self, self.norm(x), c))


class Video(nn.Module):
    """Tokens ``float[B, PLACES, FRAMES, WIDTH]``."""

    def __init__(self, way: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time, self.last = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.block = Block(way)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.cos(self.time(t[:, None]))
        return self.last(self.block(self.first(x) + c[:, None, None], c))


def of_frames(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """Written out, along the shorter axis of two."""
    scores = torch.einsum("bpic,bpjc->bpij", self.q(x), self.k(x))
    return torch.einsum("bpij,bpjc->bpic", scores.softmax(-1), self.v(x))


def linear(self: Block, x: Tensor, c: Tensor) -> Tensor:
    x = x.flatten(1, 2)
    return (self.q(x).relu() @ (self.k(x).relu().mT @ self.v(x))).unflatten(1, (PLACES, FRAMES))


def by_stretching(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """Each token with each, number by number, as graph transformers do."""
    scores = self.q(x)[:, :, None] * self.k(x)[:, None]
    return (scores.softmax(2) * self.v(x)[:, None]).sum(2)


def of_words(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """Two words that are made from the time."""
    words = torch.stack([c, -c], 1)[:, None]
    return (self.q(x) @ self.k(words).mT).softmax(-1) @ self.v(words)


def of_words_on_a_buffer(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """The same, as older attention processors write it."""
    q, words = self.q(x).flatten(1, 2), torch.stack([c, -c], 1)
    scores = torch.baddbmm(x.new_zeros(len(x), q.shape[1], 2), q, self.k(words).mT, beta=0)
    return torch.bmm(scores.softmax(-1), self.v(words)).view_as(x)


def with_made_weights(self: Block, x: Tensor, c: Tensor) -> Tensor:
    first, second = self.make(c)[:, None].unflatten(-1, (2, WIDTH, 8)).unbind(2)
    return torch.relu(x @ first) @ second.mT


def of_depths(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """Each token weighs what three maps make of it."""
    depths = torch.stack([x, self.k(x), self.v(x)])
    scores = torch.einsum("bpfc,lbpfc->bpfl", self.q(x), depths)
    return self.mlp(torch.einsum("bpfl,lbpfc->bpfc", scores.softmax(-1), depths))


def of_streams(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """A mixture of parallel streams, weighed by the token itself."""
    streams = torch.stack([x, self.k(x), self.v(x)], -2)
    return self.mlp(torch.einsum("bpfl,bpflc->bpfc", torch.tanh(self.weigh(x)), streams))


def by_a_given_map(self: Block, x: Tensor, c: Tensor) -> Tensor:
    """What an earlier block found is used again (Zipformer, arXiv 2310.11230)."""
    given = c.unflatten(-1, (PLACES, PLACES)).softmax(-1)
    return (given @ self.v(x).flatten(2)).view_as(x)


WAYS = {
    of_frames: "self_attention",
    linear: "self_attention",
    by_stretching: "self_attention",
    by_a_given_map: "self_attention",
    of_words: "cross_attention",
    of_words_on_a_buffer: "cross_attention",
    with_made_weights: "mlp",
    of_depths: "mlp",
    of_streams: "mlp",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_tokens_that_read_one_another_make_an_attention(way: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
    lazy = lazily(Video(way), torch.randn(2, PLACES, FRAMES, 4), torch.tensor([0.9, 0.9]))
    assert [branch.kind.value for branch in lazy.branches] == [WAYS[way]]
