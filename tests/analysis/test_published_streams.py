"""Streams in the style of research code: halves, vectors, values and experts, and what is found between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.published_model import TOKENS, WIDTH, lazily, mlp


class TwoStreams(nn.Module):
    """Tokens and pairs of them, both updated from one score, as graph transformers do."""

    def __init__(self, from_input: bool = False) -> None:
        super().__init__()
        self.from_input = from_input
        self.first, self.pairs, self.last = nn.Linear(4, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.q, self.k, self.v, self.e, self.to_x, self.to_e = (nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.of_pairs = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_in, e_in = x, e
        x, e = self.first(x) + t[:, None, None], self.pairs(e)
        for _ in range(2):
            score = self.q(x)[:, :, None] * self.k(x)[:, None] * self.e(e)
            x, e = x + self.to_x((score.softmax(2) * self.v(x)[:, None]).sum(2)), e + self.to_e(score)
        x, e = self.last(x), self.of_pairs(e)
        return (x + x_in, e + e_in) if self.from_input else (x, e)


@pytest.mark.parametrize("from_input", [False, True], ids=["", "with adds around the network"])
@torch.no_grad()
def test_updates_that_read_each_other_are_one_branch(from_input: bool) -> None:
    model, inputs = TwoStreams(from_input), (torch.randn(2, 5, 4), torch.randn(2, 5, 5, 3), torch.rand(2))
    lazy = lazily(model, *inputs)
    assert [[output.shape for output in branch.outputs] for branch in lazy.branches] == [
        [(2, 5, 16), (2, 5, 5, 16)]
    ] * 2
    assert {branch.kind.value for branch in lazy.branches} == {"joint_attention"}
    assert sum(branch.macs for branch in lazy.branches) / lazy.graph.total_macs > 0.9
    for seen, expected in zip(lazy(*inputs), model(*inputs), strict=True):
        assert torch.equal(seen, expected)


class Reversible(nn.Module):
    """Halves of one stream that update each other, with the first cut from what was embedded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 2 * WIDTH), nn.Linear(2 * WIDTH, 4)
        self.f, self.g = (nn.ModuleList(mlp() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = (self.first(x) + t[:, None, None]).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.last(torch.cat([a, b], -1))


@torch.no_grad()
def test_halves_that_update_each_other_are_branches_of_their_own() -> None:
    model = Reversible().eval()
    lazy = lazily(model, *TOKENS)
    assert [branch.name for branch in lazy.branches] == ["f.0", "g.0", "f.1", "g.1"]
    assert torch.equal(lazy(*TOKENS), model(*TOKENS))


class ScalesEachToken(nn.Module):
    """Modulated by a shift and a scale of each token that were cut from one tensor, behind a mixer that has no skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.condition, self.mlp = nn.Linear(4, WIDTH), mlp(), nn.Linear(4, 2 * WIDTH), mlp()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.condition(x) + t[:, None, None]).chunk(2, -1)
        x = self.mix(self.first(x) + scale) * (1 + scale) + shift
        return x + self.mlp(x)


def test_a_shift_is_no_skip_connection() -> None:
    assert [branch.name for branch in lazily(ScalesEachToken(), *TOKENS).branches] == ["mlp"]


class MixesValues(nn.Module):
    """Every attention mixes the values of the first into its own; a projection lies between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.between = (
            nn.ModuleList(nn.Linear(WIDTH, width) for _ in range(3)) for width in (3 * WIDTH, WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, first = torch.cat([x] * 4, -1) + t[:, None, None], None
        for qkv, out, between in zip(self.qkv, self.out, self.between, strict=True):
            q, k, v = qkv(x).chunk(3, -1)
            first = v if first is None else first.view_as(v)
            x = between(x + out(F.scaled_dot_product_attention(q, k, 0.5 * v + 0.5 * first)))
        return x


@torch.no_grad()
def test_values_that_later_attentions_mix_in_are_no_stream() -> None:
    model = MixesValues().eval()
    lazy = lazily(model, *TOKENS)
    kinds = [(branch.kind.value, len(branch.entries), len(branch.outputs)) for branch in lazy.branches]
    assert kinds == [("self_attention", 1, 2), *[("self_attention", 1, 1)] * 2]
    assert torch.equal(lazy(*TOKENS), model(*TOKENS))


class Biased(nn.Module):
    """Tokens attend to each other with a bias, made from features of pairs of them or from a table of positions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.pairs, self.bias, self.place = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, WIDTH)
        self.register_buffer("positions", torch.randn(6, 8))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + t[:, None, None]
        q, k, v = self.up(x).chunk(3, -1)
        bias = self.bias(torch.relu(self.pairs(z))).squeeze(-1)
        if self.how == "table":
            bias = q @ self.place(self.positions).mT
        if self.how == "added to the keys":
            k = k + self.place(self.positions)
        if self.how == "fused":
            return self.last(x + self.down(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        return self.last(x + self.down((q @ k.mT + bias).softmax(-1) @ v))


@pytest.mark.parametrize("how", ["fused", "written out", "table", "added to the keys"])
@torch.no_grad()
def test_a_bias_is_no_stream_that_is_attended_to(how: str) -> None:
    model, inputs = Biased(how), (torch.randn(2, 6, 4), torch.randn(2, 6, 6, 3), torch.rand(2))
    lazy = lazily(model, *inputs)
    assert [branch.kind.value for branch in lazy.branches] == ["self_attention"]
    assert torch.equal(lazy(*inputs), model(*inputs))


class Vectors(nn.Module):
    """One vector for each sample, as in the diffusion head of an autoregressive model or a policy over states."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + self.time(t[:, None])
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@torch.no_grad()
def test_vectors_are_a_stream_where_there_is_no_other() -> None:
    model, inputs = Vectors(), (torch.randn(8, 4), torch.rand(8))
    lazy = lazily(model, *inputs)
    assert [(branch.name, branch.row_separable) for branch in lazy.branches] == [
        (f"blocks.{i}", True) for i in range(3)
    ]
    assert torch.equal(lazy(*inputs), model(*inputs))


class Experts(nn.Module):
    """A loop over experts, each of which gets the tokens that were routed to it."""

    def __init__(self, pick: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.pick, self.gate, self.experts = pick, nn.Linear(WIDTH, 2), nn.ModuleList(mlp() for _ in range(2))
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + t[:, None, None]
        flat = x.reshape(-1, WIDTH)
        weight, chosen = torch.topk(self.gate(flat).softmax(-1), 1, dim=-1)
        hot, out = F.one_hot(chosen, 2).permute(2, 1, 0), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            place, token = self.pick(hot[index])
            out = out.index_add(0, token, expert(flat[token]) * weight[token, place, None])
        return self.last(x + out.view(x.shape))


@pytest.mark.parametrize("pick", [torch.where, lambda hot: hot.nonzero().unbind(1)], ids=["where", "nonzero"])
@torch.no_grad()
def test_routing_by_indices_is_part_of_its_branch(pick: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    model = Experts(pick)
    lazy = lazily(model, *TOKENS)
    assert [branch.kind.value for branch in lazy.branches] == ["mlp"]
    assert torch.equal(lazy(*TOKENS), model(*TOKENS))
