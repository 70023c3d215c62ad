"""How tokens run through a model: streams that meet, split, are packed, dropped, merged or fed from aside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.layers import MLP, TOKENS, WIDTH, Attention, TimeEmbedding, merge_heads, norm, split_heads
from zoo.inputs import latents, text, timestep
from zoo.parts import CHANNELS, Denoiser, token_call
from zoo.registry import Family, zoo_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + self.attn(norm(h) + c)
        return h + self.mlp(norm(h) + c)


class Streams(nn.Module):
    """Any number of streams with weights of their own meet in one attention (MMDiT, arXiv 2403.03206)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(count))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        self.mlp = nn.ModuleList(MLP() for _ in range(count))

    def forward(self, streams: list[Tensor], c: Tensor) -> list[Tensor]:
        projected = [qkv(norm(h) + c) for qkv, h in zip(self.qkv, streams, strict=True)]
        q, k, v = (split_heads(part) for part in torch.cat(projected, dim=1).chunk(3, dim=-1))
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v)).split([h.shape[1] for h in streams], dim=1)
        streams = [h + out(a) for h, out, a in zip(streams, self.out, attended, strict=True)]
        return [h + mlp(norm(h) + c) for h, mlp in zip(streams, self.mlp, strict=True)]


class ThreeStreams(nn.Module):
    """Image, text and audio in three streams, then in one, which is split at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.ModuleList(nn.Linear(CHANNELS, WIDTH) for _ in range(3)), TimeEmbedding()
        self.apart, self.joined, self.final = Streams(3), Block(), nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, text: Tensor, audio: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        c = self.time(timestep).unsqueeze(1)
        streams = [embed(item) for embed, item in zip(self.embed, (x, text, audio), strict=True)]
        h = self.joined(torch.cat(self.apart(streams, c), dim=1), c)
        image, _, sound = h.split([x.shape[1], text.shape[1], audio.shape[1]], dim=1)
        return self.final(norm(image)), self.final(norm(sound))


@zoo_model("motif-streams-three")
def three_streams() -> Family:
    return ThreeStreams(), {"x": latents(TOKENS, CHANNELS), "text": text(CHANNELS), "audio": latents(7, CHANNELS),
                            "timestep": timestep()}  # fmt: skip


class Registers(Denoiser):
    """Learned tokens join the image and are left behind at the end (arXiv 2309.16588)."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.registers = nn.Parameter(torch.empty(4, WIDTH))

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        h = torch.cat([self.registers.expand(h.shape[0], -1, -1), h], dim=1)
        return super().run(h, c)[:, 4:]


@zoo_model("motif-streams-registers")
def registers() -> Family:
    return Registers(), token_call()


class Packed(nn.Module):
    """Sequences of any length one after another, ``float[N, C]``; each token names its sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(CHANNELS, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, CHANNELS)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = MLP(), MLP()

    def forward(self, x: Tensor, sequence: Tensor, timestep: Tensor) -> Tensor:
        h = self.embed(x) + self.time(timestep)[sequence]
        h = h + self.first(norm(h))
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(0, 1) for part in self.qkv(norm(h)).chunk(3, dim=-1))
        own = sequence[:, None] == sequence[None]
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=own).transpose(0, 1).flatten(1))
        h = h + self.second(norm(h))
        return self.final(norm(h))


@zoo_model("motif-streams-packed")
def packed() -> Family:
    sequence = torch.tensor([0] * 9 + [1] * 6 + [2] * 8)
    return Packed(), {"x": torch.randn(23, CHANNELS), "sequence": sequence, "timestep": torch.full((3,), 500.0)}


class Listed(nn.Module):
    """A list of images of different sizes, padded to the longest, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(CHANNELS, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, CHANNELS)
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, x: list[Tensor], timestep: Tensor) -> list[Tensor]:
        longest = max(item.shape[0] for item in x)
        h = torch.stack([F.pad(self.embed(item), (0, 0, 0, longest - item.shape[0])) for item in x])
        seen = torch.stack([torch.arange(longest, device=h.device) < item.shape[0] for item in x])
        z = norm(h) + self.time(timestep).unsqueeze(1)
        q, k, v = (split_heads(part) for part in self.qkv(z).chunk(3, dim=-1))
        h = h + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])))
        h = self.final(norm(h + self.mlp(norm(h))))
        return [row[: item.shape[0]] for row, item in zip(h, x, strict=True)]


@zoo_model("motif-streams-list")
def listed() -> Family:
    return Listed(), {"x": [torch.randn(12, CHANNELS), torch.randn(9, CHANNELS)], "timestep": timestep()}


class Masked(Denoiser):
    """A part of the tokens is dropped on the way and filled in by a learned one (MDT, arXiv 2303.14389)."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.mask, self.side = nn.Parameter(torch.empty(1, 1, WIDTH)), Block()

    def forward(self, x: Tensor, keep: Tensor, timestep: Tensor) -> Tensor:
        h, c = self.embed(x), self.time(timestep).unsqueeze(1)
        index = keep[..., None].expand(-1, -1, WIDTH)
        kept = self.blocks[0](h.gather(1, index), c)
        filled = self.mask.expand_as(h).scatter(1, index, kept)
        return self.final(norm(self.blocks[1](filled + self.side(filled, c), c)))


@zoo_model("motif-streams-masked")
def masked() -> Family:
    keep = torch.stack([torch.randperm(TOKENS)[:10] for _ in range(2)])
    return Masked(), {"x": latents(TOKENS, CHANNELS), "keep": keep, "timestep": timestep()}


class Controlled(Denoiser):
    """A copy of the first block reads a control signal and is added between the blocks (arXiv 2302.05543)."""

    def __init__(self) -> None:
        super().__init__(Block(), Block(), Block())
        self.control, self.copy = nn.Linear(CHANNELS, WIDTH), Block()
        self.enter = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, control: Tensor, residuals: list[Tensor], timestep: Tensor) -> Tensor:
        h, c = self.embed(x), self.time(timestep).unsqueeze(1)
        steer = self.copy(h + self.control(control), c)
        for index, block in enumerate(self.blocks):
            h = block(h, c) + self.enter[index](steer) + residuals[index]
        return self.final(norm(h))


@zoo_model("motif-streams-controlled")
def controlled() -> Family:
    residuals = [latents(TOKENS, WIDTH) for _ in range(3)]
    call = {"x": latents(TOKENS, CHANNELS), "control": latents(TOKENS, CHANNELS), "residuals": residuals}
    return Controlled(), {**call, "timestep": timestep()}


class Refined(Denoiser):
    """A text that is refined by blocks of its own before it joins the image; sizes come as Python numbers."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.text, self.refine, self.place = nn.Linear(CHANNELS, WIDTH), Block(), nn.Embedding(16, WIDTH)

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor, height: int, width: int) -> Tensor:
        c = self.time(timestep).unsqueeze(1)
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        place = (self.place(rows)[:, None] + self.place(columns)[None]).flatten(0, 1)
        h = torch.cat([self.refine(self.text(text), 0 * c), self.embed(x) + place], dim=1)
        return self.final(norm(self.run(h, c)[:, text.shape[1] :]))


@zoo_model("motif-streams-refined")
def refined() -> Family:
    return Refined(), {**token_call(), "text": text(CHANNELS), "height": 4, "width": 4}


class Factorised(Denoiser):
    """Attention over the places of a frame, then over the frames of a place, by turns (Latte, Open-Sora)."""

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        frames = 4
        for block in self.blocks:
            attend = block.attn(norm(h.unflatten(1, (frames, -1)).flatten(0, 1)))
            h = h + attend.unflatten(0, (-1, frames)).flatten(1, 2)
            attend = block.attn(norm(h.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)))
            h = h + attend.unflatten(0, (h.shape[0], -1)).transpose(1, 2).flatten(1, 2)
            h = h + block.mlp(norm(h) + c)
        return h


@zoo_model("motif-streams-factorised")
def factorised() -> Family:
    return Factorised(Block(), Block()), token_call()


class Latents(Denoiser):
    """A few latent tokens read the image, think, and write back (RIN, arXiv 2212.11972)."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.start, self.read, self.write = nn.Parameter(torch.empty(6, WIDTH)), Attention(), Attention()

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        thought = self.start + c + h.mean(dim=1, keepdim=True)
        for block in self.blocks:
            thought = block(thought + self.read(norm(thought), h), c)
            h = h + self.write(norm(h), thought)
        return h


@zoo_model("motif-streams-latents")
def latent_tokens() -> Family:
    return Latents(), token_call()


class LongSkips(Denoiser):
    """Outer blocks get what the inner ones had, by concatenation or by a sum (U-ViT, arXiv 2209.12152)."""

    def __init__(self) -> None:
        super().__init__(Block(), Block(), Block(), Block(), Block())
        self.merge = nn.Linear(2 * WIDTH, WIDTH)

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        first = self.blocks[0](h, c)
        second = self.blocks[1](first, c)
        h = self.blocks[2](second, c) + second
        h = self.blocks[3](h, c)
        return self.blocks[4](self.merge(torch.cat([h, first], dim=-1)), c)


@zoo_model("motif-streams-long-skips")
def long_skips() -> Family:
    return LongSkips(), token_call()
