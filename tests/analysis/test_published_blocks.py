"""Blocks in the style of research code that no rule was made for: what is found in them, and that it is exact."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.errors import ConfigError
from support.published_model import TOKENS, WIDTH, Body, Stranger, lazily, mlp


def pair(split: Callable[[Tensor], Any]) -> Body:
    """A gate made from one half of what was split, behind the last product of the other."""

    def block(self: Stranger, x: Tensor) -> Tensor:
        value, gate = split(self.up(x)[..., :32])
        return x + self.down(value) * torch.sigmoid(gate.float())

    return block


def inside(change: Callable[[Stranger, Tensor], Tensor]) -> Body:
    """An MLP with something between its two products."""
    return lambda self, x: x + self.down(change(self, self.up(x)[..., :WIDTH]))


def normed(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def scan(self: Stranger, state: Tensor) -> Tensor:
    for _ in range(3):
        state = torch.tanh(torch.einsum("bnr,rs->bns", state, self.matrix))
    return state


def by_index(self: Stranger, x: Tensor) -> Tensor:
    """Each half of the tokens by itself, as experts for text and pixels do."""
    result = torch.zeros_like(x)
    for places in ([0, 2, 4], [1, 3, 5]):
        result[:, places] = self.mlp(x[:, places])
    return result


BLOCKS: dict[str, tuple[Body, str, bool]] = {
    "chunk": (pair(lambda h: h.chunk(2, -1)), "mlp", True),
    "split": (pair(lambda h: h.split([16, 16], -1)), "mlp", True),
    "unbind": (pair(lambda h: h.unflatten(-1, (16, 2)).unbind(-1)), "mlp", True),
    "max": (pair(lambda h: h.unflatten(-1, (16, 2)).max(-1)), "mlp", True),
    "interpolation": (lambda self, x: (1 - self.vector) * x + self.vector * self.mlp(x), "mlp", True),
    "gate of each token": (
        lambda self, x: (g := torch.sigmoid(x.mean(-1, keepdim=True))) * x + (1 - g) * self.mlp(x), "mlp", True,
    ),
    "gate of each number": (
        lambda self, x: (1 - (z := torch.sigmoid(self.down(y := self.mlp(x)) + self.vector))) * x
        + z * torch.tanh(y), "mlp", True,
    ),
    "gate of each number, by lerp": (
        lambda self, x: torch.lerp(x, self.mlp(x), torch.sigmoid(self.down(x))), "mlp", True,
    ),
    "on the sphere": (
        lambda self, x: normed(normed(x) + self.vector * (normed(self.mlp(x)) - normed(x))), "mlp", True,
    ),
    "one vector for all tokens": (lambda self, x: x + self.mlp(x.mean(1, keepdim=True)), "mlp", True),
    "einsum with dots": (
        inside(lambda self, h: torch.einsum("...r,hr->...hr", h, self.heads).prod(-2)), "mlp", True,
    ),
    "einsum without arrow": (inside(lambda self, h: torch.einsum("bnr,rs", h, self.matrix)), "mlp", True),
    "vector": (inside(lambda self, h: h * torch.sigmoid(h @ self.vector).unsqueeze(-1)), "mlp", True),
    "batch norm": (inside(lambda self, h: self.norm(h.mT).mT), "mlp", True),
    "windows": (inside(lambda self, h: F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1)), "mlp", True),
    "one hot": (inside(lambda self, h: h + F.one_hot((h[..., 0] > 0).long(), WIDTH)), "mlp", True),
    "inner": (lambda self, x: x + torch.inner(torch.relu(torch.inner(x, self.matrix)), self.matrix), "mlp", True),
    "tensordot": (
        lambda self, x: x + torch.tensordot(torch.relu(torch.tensordot(x, self.matrix, ([2], [1]))), self.matrix, 1),
        "mlp", True,
    ),
    "bilinear": (lambda self, x: x + self.bilinear(torch.relu(x), x), "mlp", True),
    "by the number of tokens": (inside(lambda self, h: h * h.shape[1] ** -0.5), "mlp", True),
    "by the number of rows": (inside(lambda self, h: h * h.shape[0] ** -0.5), "mlp", False),
    "scan with a skip": (inside(lambda self, h: scan(self, h) + h * self.vector), "mlp", True),
    "written by index": (lambda self, x: x + by_index(self, x), "mlp", True),
    "product without a sum": (
        lambda self, x: x + torch.einsum("bn,bnc->bnc", torch.sigmoid(x.mean(-1)), self.mlp(x)), "mlp", True,
    ),
    "neighbours": (
        inside(lambda self, h: F.unfold(h.mT[..., None], (3, 1), padding=(1, 0)).unflatten(1, (WIDTH, 3)).mean(2).mT),
        "mlp", True,
    ),
    "by a share of the numbers": (inside(lambda self, h: h * (h[..., :4].numel() / h.numel()) ** 0.5), "mlp", True),
    "mean of the rows, by a product": (
        lambda self, x: x + self.mlp((x.new_ones(len(x), len(x)) @ x.flatten(1)).view_as(x)), "mlp", False,
    ),
    "recurrent": (lambda self, x: x + self.down(self.gru(x)[0]), "mlp", False),
}  # fmt: skip
"""What a block does, the kind that its author would name, and whether each row can be computed alone."""


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_is_found_whole_and_is_exact(name: str) -> None:
    block, kind, separable = BLOCKS[name]
    model = Stranger(block)
    lazy = lazily(model, *TOKENS)
    assert [(branch.kind.value, branch.row_separable) for branch in lazy.branches] == [(kind, separable)] * 2
    first_and_last = 2 * 12 * 4 * WIDTH
    assert sum(branch.macs for branch in lazy.branches) == lazy.graph.total_macs - first_and_last
    for inputs in (TOKENS, (TOKENS[0][:1].repeat(3, 1, 1), TOKENS[1][:1].repeat(3))):
        assert torch.equal(lazy(*inputs), model(*inputs))
    lazy.policy = Scheduled(CacheSchedule.every(2, 4, 2))
    computed, reused = lazy(*TOKENS), lazy(TOKENS[0], TOKENS[1] - 0.5)
    assert lazy.stats.lazy_ratio == 0.5
    assert torch.isfinite(reused).all()
    lazy.reset()
    assert torch.equal(lazy(*TOKENS), computed)
    for name, parameter in model.named_parameters():
        if name.startswith(("up", "down", "mlp", "gru", "bilinear", "heads", "matrix")):
            parameter.fill_(torch.nan)  # what a reused branch would have read
    assert torch.equal(lazy(TOKENS[0], TOKENS[1] - 0.5), reused)


# Kernels ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("research_blocks::attention", mutates_args=())
def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


@kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.no_grad()
def test_a_kernel_of_somebody_else_is_work_and_costs_what_its_maker_says(caplog: pytest.LogCaptureFixture) -> None:
    model = Stranger(lambda self, x: x + kernel(*self.up(x).chunk(3, -1)))
    caplog.set_level(logging.WARNING)
    lazy = lazily(model, *TOKENS)
    assert [branch.kind.value for branch in lazy.branches] == ["self_attention"] * 2
    assert torch.equal(lazy(*TOKENS), model(*TOKENS))
    (told,) = [record.getMessage() for record in caplog.records if "work is not known" in record.getMessage()]
    assert "Stranger calls attention" in told
    caplog.clear()
    register_flop_formula(torch.ops.research_blocks.attention)(lambda q, k, v, **_: 4 * q[0] * q[1] * k[1] * q[2])
    try:
        again = lazily(model, *TOKENS)
    finally:
        del flop_registry[torch.ops.research_blocks.attention]
    assert again.branches[0].macs - lazy.branches[0].macs == 2 * 2 * 6 * 6 * WIDTH
    assert "work is not known" not in caplog.text


# Around the blocks ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    sample: Tensor
    features: Tensor | None = None


class ReturnsDataclass(Stranger):
    def forward(self, x: Tensor, t: Tensor) -> Result:  # type: ignore[override]
        x = super().forward(x, t)
        return Result(x, x.mean(1))


@torch.no_grad()
def test_a_dataclass_comes_back_as_one() -> None:
    model = ReturnsDataclass(lambda self, x: x + self.mlp(x))
    lazy = lazily(model, *TOKENS)
    seen, expected = lazy(*TOKENS), model(*TOKENS)
    assert type(seen) is Result
    assert torch.equal(seen.sample, expected.sample)
    assert torch.equal(seen.features, expected.features)


class NoiseLevel(nn.Module):
    """The time comes as a noise level, and is embedded through a logarithm or a root."""

    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.through, self.first, self.time, self.mlp = through, nn.Linear(4, WIDTH), nn.Linear(16, WIDTH), mlp()
        self.register_buffer("cos", torch.randn(8))  # called like an operator of the graph

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        angle = self.through(level)[:, None] * self.cos
        x = self.first(x) + self.time(torch.cat([angle.cos(), angle.sin()], -1))[:, None]
        return x + self.mlp(x)


@pytest.mark.parametrize("through", [torch.log, torch.sqrt, torch.reciprocal, lambda level: level**0.25])
def test_a_noise_level_is_the_time_however_it_is_embedded(through: Callable[[Tensor], Tensor]) -> None:
    assert lazily(NoiseLevel(through), *TOKENS).graph.timestep_input == "level"


class Bare(nn.Module):
    """Projections lie in dictionaries, and the outermost forward attends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({key: nn.Linear(WIDTH, WIDTH) for key in "qkvo"}) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + t[:, None, None]
        for block in self.blocks:
            x = x + block["o"](F.scaled_dot_product_attention(block["q"](x), block["k"](x), block["v"](x)))
        return self.last(x)


def test_a_branch_is_called_by_what_its_modules_have_in_common() -> None:
    assert [branch.name for branch in lazily(Bare(), *TOKENS).branches] == ["blocks.0", "blocks.1"]


class Autocast(Bare):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x, t)


def test_a_branch_under_autocast_is_called_by_its_weights() -> None:
    assert [branch.name for branch in lazily(Autocast(), *TOKENS).branches] == ["blocks.0", "blocks.1"]


def test_a_buffer_may_be_called_like_an_operator(tmp_path: Any) -> None:
    report = export_onnx(lazily(NoiseLevel(torch.log), *TOKENS), tmp_path / "model.onnx")
    assert report.if_nodes == 1


class ReadsTheTime(Stranger):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) if t.max() > 0.5 else super().forward(-x, t)


@torch.no_grad()
def test_a_model_that_decides_by_the_time_runs_and_is_not_exported(tmp_path: Any) -> None:
    model = ReadsTheTime(lambda self, x: x + self.mlp(x))
    lazy = lazily(model, *TOKENS)
    for t in (TOKENS[1], TOKENS[1] - 0.5):
        assert torch.equal(lazy(TOKENS[0], t), model(TOKENS[0], t))
    with pytest.raises(ConfigError, match="ReadsTheTime reads the value of t while it runs"):
        export_onnx(lazy, tmp_path / "model.onnx", TOKENS)
