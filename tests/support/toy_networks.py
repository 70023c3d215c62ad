"""Toy denoisers, whose ``forward`` reads like the equation in the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.layers import (
    CLASSES,
    DEPTH,
    HEADS,
    MLP,
    WIDTH,
    Attention,
    SwiGLU,
    TimeEmbedding,
    merge_heads,
    modulate,
    norm,
    sinusoid,
    split_heads,
)


class DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.modulation = Attention(), MLP(), nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(norm(x), shift1, scale1))
        x = x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))
        return x


class TinyDiT(nn.Module):
    """Class-conditional DiT with adaLN-zero (arXiv 2212.09748), at any resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.time, self.label = TimeEmbedding(), nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(DEPTH))
        self.modulation, self.final = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 3 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = h + sinusoid(torch.arange(rows * columns, device=x.device), WIDTH).to(h.dtype)
        c = self.time(t) + self.label(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        h = self.final(modulate(norm(h), shift, scale))
        return (
            h.unflatten(1, (rows, columns)).unflatten(-1, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        )


class MMDiTBlock(nn.Module):
    """Two streams with weights of their own meet in one attention (Stable Diffusion 3, arXiv 2403.03206)."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.qkv, self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), MLP()
        self.modulation, self.text_modulation = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(WIDTH, 6 * WIDTH)
        if not last:
            self.text_out, self.text_mlp = nn.Linear(WIDTH, WIDTH), MLP()

    def attend(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        streams = zip(self.text_qkv(text).chunk(3, dim=-1), self.qkv(x).chunk(3, dim=-1), strict=True)
        q, k, v = (split_heads(torch.cat(pair, dim=1)) for pair in streams)
        joint = merge_heads(F.scaled_dot_product_attention(q, k, v))
        return joint[:, text.shape[1] :], joint[:, : text.shape[1]]

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        a1, b1, g1, a2, b2, g2 = self.text_modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        attended, text_attended = self.attend(modulate(norm(x), shift1, scale1), modulate(norm(text), a1, b1))
        x = x + gate1 * self.out(attended)
        x = x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))
        if not self.last:
            text = text + g1 * self.text_out(text_attended)
            text = text + g2 * self.text_mlp(modulate(norm(text), a2, b2))
        return x, text


class TinyMMDiT(nn.Module):
    """The last block needs no text afterwards and does not update it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text, self.time = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), TimeEmbedding()
        self.blocks = nn.ModuleList(MMDiTBlock(last=i == DEPTH - 1) for i in range(DEPTH))
        self.final = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        x, text, c = self.embed(x), self.text(text), self.time(timestep)
        for block in self.blocks:
            x, text = block(x, text, c)
        return self.final(norm(x))


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, with one output projection (FLUX's single-stream block)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out, self.modulation = nn.Linear(3 * WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c)).unsqueeze(1).chunk(3, dim=-1)
        z = modulate(norm(x), shift, scale)
        attended = F.scaled_dot_product_attention(*(split_heads(part) for part in self.qkv(z).chunk(3, dim=-1)))
        return x + gate * self.out(torch.cat([merge_heads(attended), F.gelu(self.up(z))], dim=-1))


class TinyParallel(nn.Module):
    """Text and image in one sequence; the guidance scale is embedded like the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.guide, self.time = TimeEmbedding(), TimeEmbedding()
        self.blocks = nn.ModuleList(ParallelBlock() for _ in range(DEPTH))
        self.final = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, text: Tensor, guidance: Tensor, timestep: Tensor) -> Tensor:
        c = self.guide(guidance) + self.time(timestep)
        h = torch.cat([self.text(text), self.embed(x)], dim=1)
        for block in self.blocks:
            h = block(h, c)
        return self.final(norm(h[:, text.shape[1] :]))


class CrossBlock(nn.Module):
    """adaLN-single: one modulation for all blocks, shifted by a table of each (PixArt, arXiv 2310.00426)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross, self.mlp = Attention(), Attention(), MLP()
        self.table = nn.Parameter(torch.empty(6, WIDTH))

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + c).chunk(6, dim=1)
        x = x + gate1 * self.attn(modulate(norm(x), shift1, scale1))
        x = x + self.cross(x, text)
        x = x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))
        return x


class TinyCross(nn.Module):
    """Its table of positions is laid out in Python for one resolution: another needs another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text, self.time = nn.Linear(8, WIDTH), MLP(), TimeEmbedding()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.blocks = nn.ModuleList(CrossBlock() for _ in range(DEPTH))
        self.final = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        positions = torch.tensor([float(token) for token in range(int(x.shape[1]))], device=x.device)
        h = self.embed(x) + sinusoid(positions, WIDTH).to(x.dtype)
        c = self.modulation(F.silu(self.time(timestep))).unflatten(-1, (6, WIDTH))
        text = self.text(text)
        for block in self.blocks:
            h = block(h, text, c)
        return self.final(norm(h))


class UViTBlock(nn.Module):
    def __init__(self, long_skip: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), MLP()
        self.merge = nn.Linear(2 * WIDTH, WIDTH) if long_skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.merge is not None:
            x = self.merge(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class TinyUViT(nn.Module):
    """Time is a token, and the outer blocks read what the inner ones left (U-ViT, arXiv 2209.12152)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(8, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, 8)
        self.down, self.middle, self.up = UViTBlock(False), UViTBlock(False), UViTBlock(True)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        h = torch.cat([self.time(timesteps).unsqueeze(1), self.embed(x)], dim=1)
        skip = h = self.down(h)
        h = self.up(self.middle(h), skip)
        return self.final(norm(h[:, 1:]))


class GatedBlock(nn.Module):
    """Where the norms stand.

    ``pre``: before a branch, with layer scale behind it; ``sandwich``: on both sides; ``post``: after the sum;
    ``deep``: after the sum with a scaled skip (DeepNorm).
    """

    def __init__(self, norms: str) -> None:
        super().__init__()
        self.norms, self.attn, self.mlp = norms, Attention(), SwiGLU()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(4))
        self.scale1, self.scale2 = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.norms == "pre":
            x = x + self.scale1 * self.attn(self.norm1(x))
            return x + self.scale2 * self.mlp(self.norm2(x))
        if self.norms == "sandwich":
            x = x + self.norm2(self.attn(self.norm1(x)))
            return x + self.norm4(self.mlp(self.norm3(x)))
        if self.norms == "post":
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        x = self.norm1(1.5 * x + self.attn(x))
        return self.norm2(1.5 * x + self.mlp(x))


class TinyGated(nn.Module):
    def __init__(self, norms: str) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(8, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList([GatedBlock(norms)])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = self.embed(x) + self.time(sigma).unsqueeze(1)
        for block in self.blocks:
            h = block(h)
        return self.final(norm(h))


class HandWrittenBlock(nn.Module):
    """No attention operator, sums in place, a sum with ``alpha``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(norm(x)).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS), dim=-1)
        x += self.out(merge_heads(weights @ v))
        return torch.add(x, self.mlp(norm(x)), alpha=0.5)


class TinyHandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(8, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(HandWrittenBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        h += self.time(t).unsqueeze(1)
        for block in self.blocks:
            h = block(h)
        return self.final(norm(h))


class TinyRising(nn.Module):
    """Flow matching as in SiT: time is 0 at the noise and 1 at the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(8, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, c = self.embed(x), self.time(1000 * time)
        for block in self.blocks:
            h = block(h, c)
        return self.final(norm(h))


class TinyNoTime(nn.Module):
    """Blind denoising: the noise level is not told."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.final = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList([DiTBlock()])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.final(norm(h))


class TinyWindowed(nn.Module):
    """Attention within windows, which are folded into the batch, the first windows of all samples first.

    The rows of a sample do not lie together, so none can be computed alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(8, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, 8)
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.embed(x) + self.time(timestep).unsqueeze(1)
        windows = norm(h).unflatten(1, (4, -1)).transpose(0, 1).flatten(0, 1)
        h = h + self.attn(windows).unflatten(0, (4, -1)).transpose(0, 1).flatten(1, 2)
        h = h + self.mlp(norm(h))
        return self.final(norm(h))


# Models that must be refused, wholly or in part -------------------------------------------------------------------


class ResBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.time = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(c))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class TinyUNet(nn.Module):
    """Convolutions only."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbedding()
        self.first, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.outer, self.inner, self.last = ResBlock(), ResBlock(), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t)
        skip = self.outer(self.first(x), c)
        h = F.interpolate(self.inner(self.down(skip), c), scale_factor=2.0)
        return self.last(torch.cat([h, skip], dim=1))


class PlainMLP(nn.Module):
    """No skip connection anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.embed, self.mlp, self.final = TimeEmbedding(), nn.Linear(8, WIDTH), MLP(), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.final(self.mlp(self.embed(x) * self.time(t).unsqueeze(1)))


class TinyDataDependent(TinyRising):
    """Decides by what it computes with its weights: no graph can hold that."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x, time) if self.embed(x).max() > 0.5 else -super().forward(x, time)


class TinyContainer(nn.Module):
    """A skip connection around whole blocks that have skip connections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(8, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, 8)
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = DiTBlock()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.embed(x), self.time(t)
        h = h + self.leave(self.block(self.enter(h), c))
        return self.final(norm(h))
