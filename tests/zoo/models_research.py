"""Block structures of published research models, written again in short from their public code and papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.layers import CLASSES, HEADS, MLP, WIDTH, TimeEmbedding, merge_heads, modulate, norm, split_heads
from zoo.inputs import latents, timestep
from zoo.registry import Family, zoo_model


def image_call(channels: int = 4) -> dict[str, Tensor]:
    return {"x": latents(channels, 8, 8), "t": timestep(), "y": torch.tensor([1, 2])}


# U-DiT: tokens are downsampled inside attention (arXiv 2405.02730) -------------------------------------------------


class DownsampledAttention(nn.Module):
    """Cosine attention within each of four interleaved grids, behind a depthwise convolution with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Conv2d(width, width, 1)
        self.scale = nn.Parameter(torch.empty(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x) + x
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        grids = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 3, 5, 2, 4, 1).flatten(3, 4)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in self.qkv(grids).chunk(3, dim=-1))
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.clamp(max=4.6).exp()
        x = (weights.softmax(dim=-1) @ v).transpose(-3, -2).flatten(-2).unflatten(3, (rows, columns))
        return self.out(x.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3))


class ReparameterisedMLP(nn.Module):
    """Three depthwise convolutions of different sizes beside a skip, between pointwise ones, as in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width, width, 1), nn.Conv2d(width, 2 * width, 1))
        self.leave = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.Conv2d(width, width, 1))
        self.mix = nn.ModuleList(
            nn.Conv2d(2 * width, 2 * width, s, padding=s // 2, groups=2 * width) for s in (5, 3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = out = F.gelu(self.enter(x))
        for mix in self.mix:
            out = out + mix(x)
        return self.leave(out)


class UDiTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = DownsampledAttention(width), ReparameterisedMLP(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[..., None, None].chunk(6, dim=1)
        x = x + gate1 * self.attn(modulate(channel_norm(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(channel_norm(x), shift2, scale2))


def channel_norm(x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class UDiT(nn.Module):
    """Two levels; the inner one at half the size and twice the width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.final = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.time, self.label, self.widen = TimeEmbedding(), nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.outer, self.inner, self.last = UDiTBlock(WIDTH), UDiTBlock(2 * WIDTH), UDiTBlock(WIDTH)
        self.down, self.up = nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1), nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, padding=1)
        self.reduce = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t) + self.label(y)
        skip = self.outer(self.embed(x), c)
        h = self.inner(F.pixel_unshuffle(self.down(skip), 2), self.widen(c))
        h = self.reduce(torch.cat([F.pixel_shuffle(self.up(h), 2), skip], dim=1))
        return self.final(channel_norm(self.last(h, c)))


@zoo_model("research-U-DiT")
def u_dit() -> Family:
    return UDiT(), image_call()


# Hourglass (arXiv 2401.11605): neighbourhood attention outside, global attention inside ----------------------------


class HourglassBlock(nn.Module):
    """Cosine attention with a learned scale, over all tokens or over 3 x 3 neighbours, then GEGLU; skip added last."""

    def __init__(self, width: int, neighbours: bool) -> None:
        super().__init__()
        self.neighbours, self.qkv, self.out = neighbours, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale, self.adapt1, self.adapt2 = (
            nn.Parameter(torch.empty(HEADS, 1)),
            *(nn.Linear(WIDTH, width, bias=False) for _ in range(2)),
        )
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        skip = x
        x = F.rms_norm(x, x.shape[-1:]) * (1 + self.adapt1(c)[:, None, None])
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = (F.normalize(part, dim=-1) * self.scale.abs().sqrt() for part in (q, k))
        x = skip + self.out((self.near(q, k, v) if self.neighbours else self.everywhere(q, k, v)).flatten(3))
        skip = x
        value, gate = self.up(F.rms_norm(x, x.shape[-1:]) * (1 + self.adapt2(c)[:, None, None])).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate)) + skip

    def everywhere(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = q.shape[1:3]
        q, k, v = (part.flatten(1, 2).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).unflatten(1, (rows, columns))

    def near(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``float[B, H, W, HEADS, C]``: neighbours come from nine shifted copies."""
        k, v = (F.pad(part, (0, 0, 0, 0, 1, 1, 1, 1)) for part in (k, v))
        rows, columns = q.shape[1:3]
        places = [(row, column) for row in range(3) for column in range(3)]
        k, v = (torch.stack([part[:, r : r + rows, s : s + columns] for r, s in places], dim=-2) for part in (k, v))
        weights = torch.einsum("bxyhc,bxyhnc->bxyhn", q, k).softmax(dim=-1)
        return torch.einsum("bxyhn,bxyhnc->bxyhc", weights, v)


class Hourglass(nn.Module):
    """Tokens are merged on the way down, and split and added to the skip by a learned share on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.final = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.time, self.mapping = TimeEmbedding(), MLP()
        self.down, self.middle, self.up = (HourglassBlock(w, n) for w, n in [(WIDTH, True), (64, False), (WIDTH, True)])
        self.merge, self.split = nn.Linear(4 * WIDTH, 64, bias=False), nn.Linear(64, 4 * WIDTH, bias=False)
        self.share = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t)
        c = c + self.mapping(F.rms_norm(c, c.shape[-1:])) + y[:, None]
        skip = self.down(self.embed(x.movedim(1, -1)), c)
        h = self.merge(skip.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3))
        h = self.split(self.middle(h, c)).unflatten(-1, (2, 2, WIDTH))
        h = torch.addcmul(h.transpose(2, 3).flatten(3, 4).flatten(1, 2), skip, self.share)
        return self.final(F.rms_norm(self.up(h, c), (WIDTH,))).movedim(-1, 1)


@zoo_model("research-Hourglass")
def hourglass() -> Family:
    return Hourglass(), image_call()


# MDTv2 (arXiv 2303.14389): long skips by concatenation, biases of relative positions, a block aside ----------------


class MDTBlock(nn.Module):
    """Attention written out, with a bias table added in place to its scores."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * WIDTH, WIDTH) if skip else None
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), MLP()
        self.bias, self.modulation = nn.Parameter(torch.empty(HEADS, 16, 16)), nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.merge is not None:
            x = self.merge(torch.cat([x, skip], dim=-1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        q, k, v = (split_heads(part) for part in self.qkv(modulate(norm(x), shift1, scale1)).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        scores += self.bias
        x = x + gate1 * self.out(merge_heads(scores.softmax(dim=-1) @ v))
        return x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))


class MDTv2(nn.Module):
    """As it samples: nothing is masked, and what the block aside makes of the tokens is not added."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.final = nn.Conv2d(4, WIDTH, 2, stride=2), nn.Linear(WIDTH, 16)
        self.time, self.label = TimeEmbedding(), nn.Embedding(CLASSES, WIDTH)
        self.place, self.decoder_place = nn.Parameter(torch.empty(16, WIDTH)), nn.Parameter(torch.empty(16, WIDTH))
        self.enter = nn.ModuleList(MDTBlock() for _ in range(2))
        self.leave = nn.ModuleList(MDTBlock(skip=True) for _ in range(2))
        self.decoder = MDTBlock(skip=True)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t) + self.label(y)
        first = h = self.patch(x).flatten(2).transpose(1, 2) + self.place
        skips = []
        for block in self.enter:
            h = block(h, c)
            skips.append(h)
        for block in self.leave:
            h = block(h, c, skips.pop())
        h = self.decoder(h + self.decoder_place, c, first)
        return F.fold(self.final(norm(h)).transpose(1, 2), (8, 8), 2, stride=2)


@zoo_model("research-MDTv2")
def mdt() -> Family:
    return MDTv2(), image_call()
