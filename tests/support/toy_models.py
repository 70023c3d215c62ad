"""Toy denoisers: how each is made and called and what must be found in it; and the one table of tolerances.

Weights are random everywhere, so that no branch, gate or bias contributes nothing. Every toy says how it is called:
:func:`call` makes the arguments of one call, :func:`trajectory` those of a whole denoising run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention, math_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from support.layers import CLASSES, DEPTH, TOKENS, WIDTH, WORDS
from support.toy_networks import (
    PlainMLP,
    TinyContainer,
    TinyCross,
    TinyDataDependent,
    TinyDiT,
    TinyGated,
    TinyHandWritten,
    TinyMMDiT,
    TinyNoTime,
    TinyParallel,
    TinyRising,
    TinyUNet,
    TinyUViT,
    TinyWindowed,
)

TOLERANCE = {
    # Largest absolute difference, per unit of the largest value.
    "same batch": 1e-6,
    "another batch": 1e-5,  # its matrix products are summed in another order
    "bfloat16": 3e-2,
}


@dataclass(frozen=True)
class Toy:
    """A model, its inputs, and the golden list of what discovery must find.

    Attributes:
        build: the model with default weights.
        shapes: the shape of each input less the batch, in the order of the signature.
        branches: name and kind of every branch, in execution order.
        modules: for an oracle, the module that is the body of each branch, where each is one module.
    """

    build: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    branches: tuple[tuple[str, str], ...]
    modules: tuple[str, ...] = ()
    time: str | None = "timestep"
    rising: bool = False

    def model(self) -> nn.Module:
        return randomize(self.build()).eval()


SEQUENCE, TEXT, IMAGE = (TOKENS, 8), (WORDS, 8), (3, 8, 8)
PAIRS = tuple(
    (f"blocks.{i}.{name}", kind) for i in range(DEPTH) for name, kind in [("attn", "self_attention"), ("mlp", "mlp")]
)
MODULES = tuple(name for name, _ in PAIRS)

TOYS: dict[str, Toy] = {
    "dit": Toy(TinyDiT, {"x": IMAGE, "t": (), "y": ()}, PAIRS, MODULES, "t"),
    "mmdit": Toy(
        TinyMMDiT,
        {"x": SEQUENCE, "text": TEXT, "timestep": ()},
        (
            ("blocks.0", "joint_attention"),
            ("blocks.0.mlp", "mlp"),
            ("blocks.0.text_mlp", "mlp"),
            ("blocks.1", "joint_attention"),
            ("blocks.1.mlp", "mlp"),
        ),
    ),
    "parallel": Toy(
        TinyParallel,
        {"x": SEQUENCE, "text": TEXT, "guidance": (), "timestep": ()},
        (("blocks.0", "parallel"), ("blocks.1", "parallel")),
    ),
    "cross": Toy(
        TinyCross,
        {"x": SEQUENCE, "timestep": (), "text": (WORDS, WIDTH)},
        tuple(
            (f"blocks.{i}.{name}", kind)
            for i in range(DEPTH)
            for name, kind in [("attn", "self_attention"), ("cross", "cross_attention"), ("mlp", "mlp")]
        ),
        tuple(f"blocks.{i}.{name}" for i in range(DEPTH) for name in ("attn", "cross", "mlp")),
    ),
    "uvit": Toy(
        TinyUViT,
        {"x": SEQUENCE, "timesteps": ()},
        tuple(
            (f"{block}.{name}", kind)
            for block in ("down", "middle", "up")
            for name, kind in [("attn", "self_attention"), ("mlp", "mlp")]
        ),
        tuple(f"{block}.{name}" for block in ("down", "middle", "up") for name in ("attn", "mlp")),
        "timesteps",
    ),
    **{
        f"gated_{norms}": Toy(
            lambda norms=norms: TinyGated(norms), {"x": SEQUENCE, "sigma": ()}, PAIRS[:2], MODULES[:2], "sigma"
        )
        for norms in ("pre", "sandwich", "post", "deep")
    },
    "hand_written": Toy(
        TinyHandWritten,
        {"x": SEQUENCE, "t": ()},
        (
            ("blocks.0", "self_attention"),
            ("blocks.0.mlp", "mlp"),
            ("blocks.1", "self_attention"),
            ("blocks.1.mlp", "mlp"),
        ),
        time="t",
    ),
    "rising": Toy(TinyRising, {"x": SEQUENCE, "time": ()}, PAIRS, MODULES, "time", rising=True),
    "no_time": Toy(TinyNoTime, {"x": SEQUENCE, "condition": (WIDTH,)}, PAIRS[:2], MODULES[:2], None),
    "windowed": Toy(
        TinyWindowed, {"x": SEQUENCE, "timestep": ()}, (("attn", "self_attention"), ("mlp", "mlp")), ("attn", "mlp")
    ),
    "container": Toy(
        TinyContainer,
        {"x": SEQUENCE, "t": ()},
        (("block.attn", "self_attention"), ("block.mlp", "mlp")),
        ("block.attn", "block.mlp"),
        "t",
    ),
}  # fmt: skip
REFUSED: dict[str, Toy] = {
    "unet": Toy(TinyUNet, {"x": IMAGE, "t": ()}, (("outer", "conv"), ("inner", "conv")), time="t"),
    "plain": Toy(PlainMLP, {"x": SEQUENCE, "t": ()}, (), time="t"),
    "data_dependent": Toy(TinyDataDependent, {"x": SEQUENCE, "time": ()}, (), time="time", rising=True),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random: matrices keep the scale of what they read, vectors lie around one half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.5 + 0.2 * noise)
    return model


def call(toy: Toy, batch: int = 2, *, step: int = 0, steps: int = 8, seed: int = 0) -> dict[str, Any]:
    """The arguments of one call: the latents drift slowly along a trajectory, the conditions stay."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {}
    done = step / steps
    for position, (name, shape) in enumerate(toy.shapes.items()):
        if name == toy.time:
            result[name] = torch.full((batch,), done if toy.rising else float(round(999 * (1 - done))))
        elif name == "y":
            result[name] = torch.randint(CLASSES, (batch,), generator=generator)
        else:
            start, end = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
            result[name] = start + done * (end - start) if position == 0 else start
    return result


def trajectory(toy: Toy, batch: int = 2, *, steps: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    return [call(toy, batch, step=step, steps=steps, seed=seed) for step in range(steps)]


@flex_attention.py_impl(_FlopCounterMode)  # type: ignore[untyped-decorator]
def _count_flex_attention(mode: _FlopCounterMode, *args: Any) -> Any:
    """By its parts: torch has a formula for it, and does not use it."""
    with mode:
        return math_attention(*args)


def counted_by_torch(model: nn.Module, arguments: dict[str, Any]) -> float:
    """Multiply-accumulates of one call, by torch's own counter (which counts each as two operations)."""
    eager = torch.compiler.set_stance("force_eager")  # flex attention compiles itself
    with eager, FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**arguments)
    return counter.get_total_flops() / 2
