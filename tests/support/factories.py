"""Small models and samplers that the command line is given by name, as ``support.factories:tiny_dit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16
HEADS = 2


class TinyBlock(nn.Module):
    """An adaLN block: both branches are modulated, and gated, by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(F.layer_norm(x, (WIDTH,)) * (1 + scale_a) + shift_a)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_a * self.out(mixed)
        hidden = F.gelu(self.up(F.layer_norm(x, (WIDTH,)) * (1 + scale_m) + shift_m))
        return x + gate_m * self.down(hidden)


class TinyDiT(nn.Module):
    """Images ``float[B, 1, 4, 4]`` as sixteen tokens through two blocks: four branches."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(TinyBlock() for _ in range(blocks))
        self.final = nn.Linear(WIDTH, 1)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=timestep.device))
        angles = timestep[:, None].float() * frequencies
        time = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=-1).to(hidden_states.dtype)))
        x = self.embed(hidden_states.flatten(1).unsqueeze(-1))
        for block in self.blocks:
            x = block(x, time)
        result: Tensor = self.final(x).squeeze(-1).reshape(hidden_states.shape)
        return result


class ReadsItsMask(TinyDiT):
    """Masks out as many tokens as a value says."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states if mask.all() else -hidden_states, timestep)


class NoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def tiny_model(blocks: int = 2) -> TinyDiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyDiT(blocks).eval()


def tiny_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"hidden_states": torch.randn(2, 1, 4, 4, generator=generator), "timestep": torch.tensor([500, 500])}


def tiny_dit() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_model(), tiny_inputs()


def bare_dit() -> nn.Module:
    return tiny_model()


def larger_dit() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_model(blocks=3), tiny_inputs()


def reads_its_mask() -> tuple[nn.Module, dict[str, Any]]:
    return ReadsItsMask().eval(), {**tiny_inputs(), "mask": torch.ones(2, 16, dtype=torch.bool)}


def no_branches() -> tuple[nn.Module, dict[str, Any]]:
    return NoBranches(), {"x": torch.randn(2, 3, 4)}


def not_a_model() -> str:
    return "a string"


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def broken() -> nn.Module:
    raise RuntimeError("this factory is broken")


def euler(steps: int = 5) -> Callable[[Callable[..., Any], int], Tensor]:
    """Straight steps from noise along the model's output."""

    def sample(denoiser: Callable[..., Any], seed: int) -> Tensor:
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for step in range(steps):
                t = torch.full((2,), 1000 - step * (1000 // steps))
                x = x - denoiser(hidden_states=x, timestep=t) / steps
        return x

    return sample
