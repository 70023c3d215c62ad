"""Models whose captures are kept on disk, and calls of them, the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_folder import CaptureFolder
from lazy_compile.capture.captured import Capture
from lazy_compile.capture.ladder import capture
from lazy_compile.ir.program import module_state
from support import diffusers_families as families
from support.layers import WIDTH
from support.repeated import Stack
from support.toy_models import randomize

Call = dict[str, Any]


class Toy(Stack):
    """Has a table in a list, one in a plain attribute, and makes one in its code."""

    factor = 1.0

    def __init__(self, depth: int = 1) -> None:
        super().__init__(depth=depth)
        self.tables = [torch.linspace(-1, 1, WIDTH)]
        self.table = torch.linspace(1, 2, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        signs = torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)
        h = self.embed(x) + self.tables[0] * signs * self.factor + self.table
        for block in self.blocks:
            h = block(h, self.condition(t))
        return self.final(h)

    def condition(self, t: Tensor) -> Tensor:
        return t[:, None].expand(-1, WIDTH) / scale()


SCALE = 1000.0


def scale() -> float:
    return SCALE


def toy(depth: int = 1) -> Toy:
    model = Toy(depth).eval()
    randomize(model, 0)
    return model


def call(batch: int = 2, tokens: int = 6) -> Call:
    generator = torch.Generator().manual_seed(batch)
    return {"x": torch.randn(batch, tokens, 8, generator=generator), "t": torch.full((batch,), 500.0)}


FAMILIES = {"dit": families.dit, "pixart": families.pixart, "sd3": families.sd3, "flux": families.flux}


def case(name: str) -> tuple[nn.Module, Call, Call]:
    """A model, a call, and one with a batch of 3."""
    torch.manual_seed(0)
    model, arguments = (toy(2), call()) if name == "toy" else FAMILIES[name]()
    randomize(model, 0)

    def three(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.shape[0] == 2
        return torch.cat([leaf, leaf[:1] * 0.5 if leaf.is_floating_point() else leaf[:1]]) if is_batch else leaf

    return model.eval(), arguments, pytree.tree_map(three, arguments)


def kept_capture(model: nn.Module, arguments: Call, folder: Path) -> Capture:
    layout, tensors = CallLayout.of((), arguments)
    return capture(model, layout, tensors, folder=CaptureFolder(folder))


def run(found: Capture, model: nn.Module, arguments: Call) -> list[Tensor]:
    _, tensors = CallLayout.of((), arguments)
    with torch.no_grad():
        return list(found.program.graph_module(*found.program.bind(module_state(model), tensors)))
