"""Stacks of blocks for the capture of repeated modules: alike ones, and ones that differ in one way each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.layers import MLP, WIDTH, Attention, norm, sinusoid


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.scale = Attention(), MLP(), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.scale(condition)[:, None].chunk(2, dim=-1)
        x = x + a * self.attn(norm(x))
        return x + b * self.mlp(norm(x))


class Stack(nn.Module):
    """``blocks`` one after the other; how each is called, and what is done with what it returns, is a method."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.final = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, condition = self.embed(x), sinusoid(t, WIDTH)
        for index, block in enumerate(self.blocks):
            h = self.step(index, block, h, condition)
        return self.final(norm(h))

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Any:
        return block(h, condition)


class Changes(Stack):
    """Applies ``change`` to each block and its index once they are made."""

    def __init__(
        self, change: Callable[[int, nn.Module], None], block: Callable[[], nn.Module] = Block, depth: int = 4
    ) -> None:
        super().__init__(block, depth)
        for index, module in enumerate(self.blocks):
            change(index, module)


class Scaled(Block):
    """Reads a number of its own."""

    factor = 1.0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x * self.factor, condition)


class WithTable(Block):
    """Adds rows of a buffer, as many as it has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(4, WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x + self.table.mean(0), condition)


def longer_table(index: int, block: nn.Module) -> None:
    if index % 2:
        block.register_buffer("table", torch.full((6, WIDTH), 2.0))


def own_number(index: int, block: nn.Module) -> None:
    block.factor = 1.0 + index


def own_index(index: int, block: nn.Module) -> None:
    block.layer_index = index


def own_hook(index: int, block: nn.Module) -> None:
    block.register_forward_hook(lambda module, args, result: result * (1 + index))


def own_inner_hook(index: int, block: nn.Module) -> None:
    block.mlp.register_forward_pre_hook(lambda module, args: (args[0] * (1 + index),))


def own_forward(index: int, block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda x, condition: forward(x, condition) * (1 + index)


def own_inner_forward(index: int, block: nn.Module) -> None:
    forward = block.mlp.forward
    block.mlp.forward = lambda x: forward(x) * (1 + index)


def own_eps(index: int, block: nn.Module) -> None:
    block.norm = nn.LayerNorm(WIDTH, eps=10.0**-index)


COUNTS = {"calls": 0}
_LEFT: dict[str, Tensor] = {}


class ReadsGlobal(Block):
    """Each block writes what the next one reads."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if "h" in _LEFT:
            x = x + _LEFT["h"]
        x = super().forward(x, condition)
        _LEFT["h"] = x
        return x


class FirstWrites(Block):
    """All read what the first one has written."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if "first" not in _LEFT:
            _LEFT["first"] = condition.sum(-1)[:, None, None].tanh()
        return super().forward(x * _LEFT["first"], condition)


class Counts(Block):
    """The fourth call does otherwise."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return super().forward(2 * x if COUNTS["calls"] == 4 else x, condition)


class WithGlobals(Stack):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        _LEFT.clear()
        COUNTS["calls"] = 0
        return super().forward(x, t)


class Collects(Stack):
    """Its blocks are given a list that grows, and read all of it."""

    def __init__(self) -> None:
        super().__init__(Collecting)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.earlier: list[Tensor] = []
        return super().forward(x, t)

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        h = block(h, condition, self.earlier)
        self.earlier.append(h)
        return h


class Collecting(Block):
    def forward(self, x: Tensor, condition: Tensor, earlier: list[Tensor] = ()) -> Tensor:
        return super().forward(x + sum(earlier) if earlier else x, condition)


class Appends(Stack):
    """Its blocks write into a list that they are given."""

    def __init__(self) -> None:
        super().__init__(Appending)

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        left: list[Tensor] = []
        h = block(h, condition, left)
        return h + left[0]


class Appending(Block):
    def forward(self, x: Tensor, condition: Tensor, left: list[Tensor]) -> Tensor:
        left.append(x.tanh())
        return super().forward(x, condition)


class WritesBehind(Stack):
    """Adds in place to a part of what a block returned."""

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        h = block(h, condition)
        h[:, :2].add_(condition[:, None])
        return h


class WritesInput(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        condition.mul_(0.9)
        return super().forward(x, condition)


class KeepsInput(Stack):
    """The same, and reads afterwards what the blocks have written."""

    def __init__(self) -> None:
        super().__init__(WritesInput)


class Keeps(Block):
    """Leaves what it made for others to read."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self.left = x = super().forward(x, condition)
        return x.tanh()


class ReadsKept(Stack):
    def __init__(self) -> None:
        super().__init__(Keeps)

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        return block(h, condition) + block.left


class Parts(Block):
    """Returns two parts of one tensor, what it was given, and no more."""

    def forward(self, x: Tensor, condition: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, None, int]:
        x = super().forward(x, condition)
        return x[:, :rows], x[:, rows:], condition, None, rows


class InParts(Stack):
    """Hands on sizes, and tuples of tensors; the last block leaves one of them unread."""

    def __init__(self) -> None:
        super().__init__(Parts, depth=5)

    def step(self, index: int, block: nn.Module, h: Any, condition: Tensor) -> Any:
        x, rows = (h, h.shape[1] // 2) if isinstance(h, Tensor) else (torch.cat(h, dim=1), h[0].shape[1])
        first, second, _, _, rows = block(x, condition, rows=rows)
        return first if index == len(self.blocks) - 1 else (first, second[:, : x.shape[1] - rows])


class LongSkips(nn.Module):
    """U-ViT: the last blocks read what the first ones left (arXiv 2209.12152)."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.final = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.down = nn.ModuleList(Block() for _ in range(depth))
        self.up = nn.ModuleList(Joining() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, condition, skips = self.embed(x), sinusoid(t, WIDTH), []
        for block in self.down:
            h = block(h, condition)
            skips.append(h)
        for block in self.up:
            h = block(h, skips.pop(), condition)
        return self.final(norm(h))


class Joining(Block):
    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor, condition: Tensor) -> Tensor:
        return super().forward(self.join(torch.cat([x, skip], dim=-1)), condition)


class Looped(Stack):
    """Its blocks are run twice."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, condition = self.embed(x), sinusoid(t, WIDTH)
        for block in [*self.blocks, *self.blocks]:
            h = block(h, condition)
        return self.final(norm(h))


class Detached(Stack):
    """Every second block is called without gradients."""

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        if index % 2:
            with torch.no_grad():
                return block(h, condition)
        return block(h, condition)


class Swallows(Stack):
    """Goes on where a block fails."""

    def __init__(self) -> None:
        super().__init__(Counts)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        COUNTS["calls"] = 0
        return super().forward(x, t)

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        try:
            return block(h, condition)
        except Exception:
            return h


class MakesConstant(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x * torch.tensor(0.5), condition)


class SharesActivation(Stack):
    """One module under several names, by which export knows what it makes."""

    def __init__(self) -> None:
        super().__init__()
        activation = nn.SiLU()
        for block in self.blocks:
            block.activation = activation

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        return block.activation(block(h, condition))


class Autocast(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x + self.mlp(x).float()
        return super().forward(x, condition)


class Draws(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.rand_like(x), condition)


class TakesSize(Block):
    """Reads a size that its model has noted in it."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x.unflatten(1, (2, self.half)).flip(1).flatten(1, 2), condition)


class NotesSizes(Stack):
    def __init__(self) -> None:
        super().__init__(TakesSize)

    def step(self, index: int, block: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        block.half = h.shape[1] // 2
        return block(h, condition)


class Selects(Block):
    """Reads as many rows as the numbers in them say."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x + x[condition.sum(-1) > -100].sum(0), condition)
