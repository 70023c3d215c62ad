"""Ways to attend that diffusers lacks or hides in a processor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.layers import HEADS, MLP, WIDTH, Attention, SwiGLU, merge_heads, norm, split_heads
from zoo.parts import denoiser
from zoo.registry import Family, zoo_model

HEAD = WIDTH // HEADS
Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From query, key and value, ``float[B, HEADS, N, HEAD]``, to what was attended."""


class CoreBlock(nn.Module):
    """A block around one way to attend."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core, self.qkv, self.out, self.mlp = core, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(norm(h) + c).chunk(3, dim=-1))
        h = h + self.out(merge_heads(self.core(q, k, v)))
        return h + self.mlp(norm(h))


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(HEAD)).softmax(dim=-1) @ v


def two_einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).div(math.sqrt(HEAD)).softmax(dim=-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def scores_on_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As older attention processors do it: heads in the batch, scores added to a buffer, weighted by nothing."""
    batch, heads, length, _ = q.shape
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    empty = q.new_zeros(batch * heads, length, length)
    weights = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(HEAD)).softmax(dim=-1)
    return torch.bmm(weights, v).unflatten(0, (batch, heads))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positive features instead of a softmax, normalised by what they add up to (arXiv 2006.16236)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    total = q @ k.sum(dim=-2).unsqueeze(-1)
    return q @ (k.transpose(-2, -1) @ v) / (total + 1e-6)


def channel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels attend to channels (XCiT, arXiv 2106.09681)."""
    q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
    return v @ (k.transpose(-2, -1) @ q).softmax(dim=-2)


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (F.rms_norm(part, (HEAD,)) for part in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def causal_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Four tokens a frame; a frame sees itself and earlier ones."""
    frame = torch.arange(q.shape[2], device=q.device) // 4
    return F.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame[None])


for name, way in {
    "by-products": two_products,
    "by-einsum": two_einsums,
    "by-baddbmm": scores_on_a_bias,
    "linear": linear_attention,
    "of-channels": channel_attention,
    "qk-norm": normalised,
    "causal-frames": causal_frames,
}.items():
    zoo_model(f"motif-attention-{name}")(lambda way=way: denoiser(CoreBlock(way), CoreBlock(way)))


class DifferentialBlock(nn.Module):
    """The difference of two softmax maps (arXiv 2410.05258), with SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.mlp, self.share = nn.Linear(WIDTH, WIDTH), SwiGLU(), nn.Parameter(torch.tensor([0.3]))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        z = norm(h) + c
        v = split_heads(self.v(z))
        halves = zip(self.q(z).chunk(2, dim=-1), self.k(z).chunk(2, dim=-1), strict=True)
        first, second = (F.scaled_dot_product_attention(split_heads(q), split_heads(k), v) for q, k in halves)
        h = h + self.out(merge_heads(first - self.share * second))
        return h + self.mlp(norm(h))


@zoo_model("motif-attention-differential")
def differential() -> Family:
    return denoiser(DifferentialBlock(), DifferentialBlock())


class GatedBlock(nn.Module):
    """What was attended is multiplied by a gate of the same tokens, before or behind the output projection."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.behind, self.qkv, self.gate = behind, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        z = norm(h) + c
        gate = torch.sigmoid(self.gate(z))
        attended = merge_heads(
            F.scaled_dot_product_attention(*(split_heads(part) for part in self.qkv(z).chunk(3, dim=-1)))
        )
        h = h + (gate * self.out(attended) if self.behind else self.out(gate * attended))
        return h + self.mlp(norm(h))


@zoo_model("motif-attention-gated")
def gated() -> Family:
    return denoiser(GatedBlock(behind=False), GatedBlock(behind=True))


class TorchBlock(nn.Module):
    """torch's own attention module, on batch-first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        z = norm(h) + c
        h = h + self.attn(z, z, z, need_weights=False)[0]
        return h + self.mlp(norm(h))


@zoo_model("motif-attention-torch-module")
def torch_module() -> Family:
    return denoiser(TorchBlock(), TorchBlock())


class TorchLayer(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=norm_first)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return self.layer(h + c)


@zoo_model("motif-attention-torch-layer")
def torch_layer() -> Family:
    return denoiser(TorchLayer(norm_first=True), TorchLayer(norm_first=False))


class TimeAttentionBlock(nn.Module):
    """Query, key and value read the timestep too (DiffiT, arXiv 2312.02139)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.time_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), MLP()
        self.bias = nn.Parameter(torch.empty(HEADS, 1, 1))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in (self.qkv(norm(h)) + self.time_qkv(c)).chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(HEAD) + self.bias).softmax(dim=-1)
        h = h + self.out(merge_heads(weights @ v))
        return h + self.mlp(norm(h))


@zoo_model("motif-attention-of-time")
def of_time() -> Family:
    return denoiser(TimeAttentionBlock(), TimeAttentionBlock())


class WindowBlock(nn.Module):
    """Attention within windows of a 4 x 4 grid, which are folded into the batch, and may be shifted by half."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.attn, self.mlp = shift, Attention(), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        image = (norm(h) + c).unflatten(1, (4, 4)).roll((-self.shift, -self.shift), dims=(1, 2))
        windows = image.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        attended = self.attn(windows).unflatten(0, (-1, 2, 2)).unflatten(3, (2, 2))
        image = attended.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        h = h + image.roll((self.shift, self.shift), dims=(1, 2)).flatten(1, 2)
        return h + self.mlp(norm(h))


@zoo_model("motif-attention-windows")
def windows() -> Family:
    return denoiser(WindowBlock(0), WindowBlock(1))
