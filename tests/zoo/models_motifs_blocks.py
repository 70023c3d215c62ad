"""Ways to add a branch to the stream, and ways to fill one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.layers import MLP, WIDTH, Attention, SwiGLU, modulate, norm
from zoo.parts import Denoiser, denoiser, token_call
from zoo.registry import Family, zoo_model


class ScaledBlock(nn.Module):
    """Layer scale on the branches, and a stream that shrinks: ``sqrt(1 - p) x + sqrt(p) f(x)``."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.keep, self.take = (1 - share) ** 0.5, share**0.5
        self.attn, self.mlp = Attention(), SwiGLU()
        self.scale1, self.scale2 = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = self.keep * h + self.take * (self.scale1 * self.attn(norm(h) + c))
        return h * self.keep + self.take * (self.scale2 * self.mlp(norm(h)))


@zoo_model("motif-add-scaled")
def scaled() -> Family:
    return denoiser(ScaledBlock(0.3), ScaledBlock(0.5))


class InPlaceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h += self.attn(norm(h) + c)
        h.add_(self.mlp(norm(h)), alpha=0.5)
        return torch.sub(h, self.mlp(norm(h)), alpha=0.25)


@zoo_model("motif-add-in-place")
def in_place() -> Family:
    return denoiser(InPlaceBlock(), InPlaceBlock())


class CastBlock(nn.Module):
    """The sum is taken in another precision, and the stream handed on in its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.gate = Attention(), MLP(), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        gate1, gate2 = self.gate(F.silu(c)).double().chunk(2, dim=-1)
        h = (h.double() + gate1 * self.attn(norm(h) + c).double()).type_as(h)
        return torch.addcmul(h.double(), gate2, self.mlp(norm(h.double()).to(h.dtype)).double()).to(h)


@zoo_model("motif-add-through-casts")
def casts() -> Family:
    return denoiser(CastBlock(), CastBlock())


class NormBlock(nn.Module):
    """Norms before and behind a branch and behind the sum, with a gate that is bounded by tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.gate = Attention(), SwiGLU(), nn.Linear(WIDTH, 2 * WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(6))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        gate1, gate2 = self.gate(F.silu(c)).tanh().chunk(2, dim=-1)
        h = self.norms[2](h + gate1 * self.norms[1](self.attn(self.norms[0](h))))
        return self.norms[5](h + gate2 * self.norms[4](self.mlp(self.norms[3](h))))


@zoo_model("motif-norms-everywhere")
def norms() -> Family:
    return denoiser(NormBlock(), NormBlock())


class ParallelBlock(nn.Module):
    """Attention and MLP read the same norm and are gated by the timestep one by one (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated, self.attn, self.mlp, self.gate = gated, Attention(), MLP(), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        z = norm(h) + c
        gate1, gate2 = self.gate(F.silu(c)).chunk(2, dim=-1)
        if self.gated:
            return h + (gate1 * self.attn(z) + gate2 * self.mlp(z))
        return h + self.attn(z) + self.mlp(z)


@zoo_model("motif-parallel")
def parallel() -> Family:
    return denoiser(ParallelBlock(gated=False), ParallelBlock(gated=True))


class GluBlock(nn.Module):
    """A shift of the tokens' own neighbourhood, GEGLU, and one modulation for both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.up, self.down = Attention(), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=-1)
        h = h + self.attn(modulate(norm(h), shift, scale))
        value, gate = self.up(modulate(norm(h), shift, scale)).chunk(2, dim=-1)
        return h + self.down(value * F.gelu(gate))


@zoo_model("motif-mlp-geglu")
def geglu() -> Family:
    return denoiser(GluBlock(), GluBlock())


class ConvMLP(nn.Module):
    """Pointwise, depthwise, gated, pointwise (Mix-FFN of SegFormer and Sana), on a 4 x 4 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(WIDTH, 4 * WIDTH, 1), nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.depthwise = nn.Conv2d(4 * WIDTH, 4 * WIDTH, 3, padding=1, groups=4 * WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        image = z.transpose(1, 2).unflatten(-1, (4, 4))
        value, gate = self.depthwise(F.silu(self.up(image))).chunk(2, dim=1)
        return self.down(value * F.silu(gate)).flatten(2).transpose(1, 2)


class ExpertsByMask(nn.Module):
    """Every expert sees every token; a softmax over the two best decides what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(MLP() for _ in range(4))

    def forward(self, z: Tensor) -> Tensor:
        best, chosen = self.route(z).topk(2, dim=-1)
        weights = torch.zeros_like(self.route(z)).scatter(-1, chosen, best.softmax(dim=-1))
        return sum(weights[..., index, None] * expert(z) for index, expert in enumerate(self.experts))


class ExpertsByIndex(nn.Module):
    """Experts choose their tokens (arXiv 2202.09368), which are gathered, and their results scattered back."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Parameter(torch.empty(4, WIDTH, 64)), nn.Parameter(torch.empty(4, 64, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        weights, chosen = self.route(z).softmax(dim=-1).transpose(1, 2).topk(8, dim=-1)
        index = chosen.flatten(1)[..., None].expand(-1, -1, WIDTH)
        hidden = F.gelu(z.gather(1, index).unflatten(1, (4, 8)) @ self.up)
        made = (hidden @ self.down) * weights[..., None]
        return torch.zeros_like(z).scatter_add(1, index, made.flatten(1, 2))


class ExpertsByDispatch(nn.Module):
    """The same, by products with zeros and ones instead of an index (EC-DiT, arXiv 2410.02098)."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Parameter(torch.empty(4, WIDTH, 64)), nn.Parameter(torch.empty(4, 64, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        weights, chosen = self.route(z).softmax(dim=-1).transpose(1, 2).topk(8, dim=-1)
        places = F.one_hot(chosen, z.shape[1]).to(z.dtype)
        taken = torch.einsum("bekn,bnd->bekd", places, z)
        hidden = F.gelu(torch.einsum("bekd,edf->bekf", taken, self.up))
        made = torch.einsum("bekf,efd->bekd", hidden, self.down)
        return torch.einsum("bekn,bekd->bnd", places * weights[..., None], made)


class ExpertsAndShared(nn.Module):
    """One of three small experts by a Gumbel-free argmax, beside one that all tokens use."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.shared = nn.Linear(WIDTH, 3), SwiGLU()
        self.weights = nn.Parameter(torch.empty(3, WIDTH, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        share, chosen = self.route(z).softmax(dim=-1).max(dim=-1)
        own = torch.einsum("bnd,bnde->bne", z, self.weights[chosen])
        return self.shared(z) + share[..., None] * F.silu(own)


class FillBlock(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), mlp

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + self.attn(norm(h) + c)
        return h + self.mlp(norm(h) + c)


for name, make in {
    "convolutional": ConvMLP,
    "experts-by-mask": ExpertsByMask,
    "experts-by-index": ExpertsByIndex,
    "experts-by-dispatch": ExpertsByDispatch,
    "experts-and-shared": ExpertsAndShared,
}.items():
    zoo_model(f"motif-mlp-{name}")(lambda make=make: denoiser(FillBlock(make()), FillBlock(make())))


class ScanBlock(nn.Module):
    """A causal convolution and a gated running sum mix the tokens, as in Mamba (arXiv 2312.00752), then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.mlp = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), MLP()
        self.conv, self.decay = nn.Conv1d(2 * WIDTH, 2 * WIDTH, 4, groups=2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        value, gate = self.enter(norm(h) + c).chunk(2, dim=-1)
        value = F.silu(self.conv(F.pad(value.transpose(1, 2), (3, 0)))).transpose(1, 2)
        total = 0.1 * F.logsigmoid(self.decay(value)).cumsum(dim=1)
        state = (value * torch.exp(-total)).cumsum(dim=1) * torch.exp(total)
        h = h + self.leave(state * F.silu(gate))
        return h + self.mlp(norm(h))


class MixerBlock(nn.Module):
    """Attention, then a branch that mixes tokens by a linear map along them (arXiv 2105.01601), then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.up, self.down, self.mlp = Attention(), nn.Linear(16, 32), nn.Linear(32, 16), MLP()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + self.attn(norm(h) + c)
        h = h + self.down(F.gelu(self.up(F.rms_norm(h, (WIDTH,)).transpose(1, 2)))).transpose(1, 2)
        return h + self.mlp(norm(h))


@zoo_model("motif-token-mixers")
def mixers() -> Family:
    return denoiser(ScanBlock(), MixerBlock())


class Checkpointed(Denoiser):
    """Each block under gradient checkpointing, whether or not gradients are asked for."""

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            h = checkpoint(block, h, c, use_reentrant=False)
        return h


@zoo_model("motif-checkpointed")
def checkpointed() -> Family:
    return Checkpointed(FillBlock(MLP()), FillBlock(MLP())), token_call()


class Recurrent(Denoiser):
    """One block with its weights, used three times, and told which time it is."""

    def __init__(self) -> None:
        super().__init__(FillBlock(SwiGLU()))
        self.turn = nn.Embedding(3, WIDTH)

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        for turn in range(3):
            h = self.blocks[0](h, c + self.turn.weight[turn])
        return h


@zoo_model("motif-shared-weights")
def shared_weights() -> Family:
    return Recurrent(), token_call()
