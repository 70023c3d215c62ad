"""Operators that are written in others before a model is converted, through ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from onnx import load
from torch import Tensor, nn
from torch.nn import functional as F

import lazy_compile
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from support.layers import MLP, WIDTH, Attention, norm, sinusoid
from support.toy_models import randomize

SIDE, PATCH = 8, 2


class Patches(nn.Module):
    """Patches of an image by unfold and fold; a convolution whose padding is one number in a list, a filter by
    frequency, and a table that is picked from by bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.enter, self.leave = nn.Linear(3 * PATCH**2, WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, image: Tensor, t: Tensor, level: Tensor) -> Tensor:
        image = F.conv2d(image, self.first.weight, self.first.bias, padding=(1,))
        x = self.enter(F.unfold(image, PATCH, stride=PATCH).transpose(1, 2))
        x = x + sinusoid(t, WIDTH)[:, None] + torch.fft.rfftfreq(2 * WIDTH - 2) + torch.fft.fftfreq(WIDTH, 0.5)
        x = x + level.float()[:, None, None] / 255
        x = x + self.attn(norm(x))
        x = x + self.mlp(norm(x))
        return F.fold(self.leave(x).transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)


def test_the_file_gives_what_the_model_gives(tmp_path: Path) -> None:
    model = randomize(Patches()).eval()
    inputs = {
        "image": torch.randn(2, 3, SIDE, SIDE),
        "t": torch.full((2,), 500.0),
        "level": torch.tensor([3, 200], dtype=torch.uint8),
    }
    lazy = lazy_compile.transform(model, inputs)
    lazy_compile.export_onnx(lazy, tmp_path / "m.onnx", dynamic=False)
    assert "Col2Im" not in {node.op_type for node in load(tmp_path / "m.onnx").graph.node}
    with torch.no_grad():
        dense = model(**inputs)
        assert torch.equal(lazy(**inputs), dense)
    with torch.no_grad():
        result = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx"))(**inputs)
    torch.testing.assert_close(result, dense, atol=1e-4, rtol=1e-4)
