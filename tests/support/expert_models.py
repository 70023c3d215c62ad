"""Denoisers whose feed-forward parts choose in Python: experts by counts and loops, NumPy, kernels without shapes."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.layers import MLP, WIDTH, Attention, norm, sinusoid

EXPERTS, CHOSEN = 4, 2


class Route(nn.Module):
    """The two best experts of each token, and their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = F.linear(x, self.weight).softmax(-1).topk(CHOSEN, -1)
        return chosen, weights / weights.sum(-1, keepdim=True)


class Experts(nn.Module):
    """Tokens sorted by expert, the ends of their runs counted and read in Python; one expert is for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.route = Route()
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))
        self.shared = MLP()

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.route(x)
        tokens = x.flatten(0, -2)
        mixed = self.run(tokens, chosen.flatten(), weights.reshape(-1, 1))
        return mixed.view(x.shape) + self.shared(x)

    def run(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(tokens)
        order = chosen.argsort(stable=True)
        ends = chosen.bincount(minlength=EXPERTS).cpu().numpy().cumsum(0)
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start != end:
                places = order[start:end] // CHOSEN
                result.index_add_(0, places, self.experts[number](tokens[places]) * weights[order[start:end]])
        return result


class ExpertsByItem(Experts):
    """Asks each expert whether anybody chose it."""

    def run(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        chosen, weights, result = chosen.view(-1, CHOSEN), weights.view(-1, CHOSEN), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            taken = chosen == number
            if taken.sum().item() > 0:
                lines, ranks = taken.nonzero(as_tuple=True)
                result[lines] += expert(tokens[lines]) * weights[lines, ranks, None]
        return result


class CapacityExperts(nn.Module):
    """Takes no more tokens than an expert has room for, of the whole batch: rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.route = Route()
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen, weights = self.route(tokens)
        result, room = torch.zeros_like(tokens), len(tokens) // EXPERTS
        for number, expert in enumerate(self.experts):
            lines = torch.from_numpy(np.flatnonzero((chosen[:, 0] == number).numpy())[:room])
            result[lines] = expert(tokens[lines]) * weights[lines, :1]
        return result.view(x.shape)


class SpectrumInNumPy(nn.Module):
    """Filters along the tokens in NumPy, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        spectrum = np.fft.rfft(h.detach().cpu().numpy(), axis=1)
        spectrum[:, 2:] *= 0.5
        return self.leave(torch.from_numpy(np.fft.irfft(spectrum, h.shape[1], axis=1)).to(h.dtype))


@torch.library.custom_op("lazy_compile_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    """A kernel whose author told torch nothing about its shapes."""
    return x * x.sigmoid()


swish.register_autograd(
    lambda ctx, gradient: gradient * (s := ctx.saved_tensors[0].sigmoid()) * (1 + ctx.saved_tensors[0] * (1 - s)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class KernelWithoutShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swish(self.up(x)))


def scripted_activation(x: Tensor) -> Tensor:
    return torch.tanh(x)


def scripted_gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return scripted_activation(a) * b


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    SCRIPTED_GATE = torch.jit.script(scripted_gate)


def scripted_activation(x: Tensor) -> Tensor:  # type: ignore[no-redef]  # noqa: F811
    return torch.sin(x)


class ScriptedMLP(nn.Module):
    """Its activation was compiled from a source that reads otherwise by now."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(SCRIPTED_GATE(self.up(x)))


class AttentionByItem(Attention):
    """Looks at its queries before it attends."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        result = super().forward(x, context)
        return result * 2 if self.q(x).abs().max().item() > 1e6 else result


class Denoiser(nn.Module):
    """Blocks of attention and a feed-forward part."""

    def __init__(self, feed_forward: type[nn.Module], attention: type[nn.Module] = Attention, depth: int = 2) -> None:
        super().__init__()
        self.attns = nn.ModuleList(attention() for _ in range(depth))
        self.mlps = nn.ModuleList(feed_forward() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + sinusoid(t, WIDTH).to(x.dtype)[:, None]
        for attn, mlp in zip(self.attns, self.mlps, strict=True):
            x = x + attn(norm(x))
            x = x + mlp(norm(x))
        return x
