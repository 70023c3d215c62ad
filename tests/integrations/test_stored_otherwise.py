"""Weights that are cast, unpacked or fetched while a model runs: the layers that hold them are called as they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule
from support.layers import WIDTH
from support.slow import slow_but
from support.small_model import SMALL, Small
from support.toy_models import call, randomize, trajectory

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Packed(nn.Parameter):
    """Two numbers of four bits in each byte, of a class that torch cannot take apart."""


class PackedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = torch.stack([self.weight >> 4, self.weight & 15], -1).flatten(1).to(input.dtype) / 8 - 1
        return nn.functional.linear(input, weight, self.bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        result = cls(linear.in_features, linear.out_features)
        levels = ((linear.weight.detach().clamp(-1, 0.875) + 1) * 8).round().to(torch.uint8)
        result.weight = Packed(levels[:, ::2] << 4 | levels[:, 1::2], requires_grad=False)
        result.bias = linear.bias
        return result


def packed(model: nn.Module, folder: Path) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear.of(child))


def cast(model: nn.Module, folder: Path) -> None:
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def by_leaves(model: nn.Module, folder: Path) -> None:
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def sequential(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, CPU)


def on_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, str(folder), CPU)


STORES = [packed, cast, by_leaves, sequential, on_disk]
EVERY_RUN = [*(("stored", store) for store in STORES), ("transformed", packed), ("transformed", on_disk)]


@pytest.mark.parametrize(("first", "store"), slow_but(EVERY_RUN, product(("stored", "transformed"), STORES)))
def test_its_results_are_those_of_the_model(
    first: str, store: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    model, calls = randomize(Small()).eval(), trajectory(SMALL, steps=4)
    if first == "transformed":
        lazy = lazy_compile.transform(model)
        store(model, tmp_path)
    else:
        store(model, tmp_path)
        lazy = lazy_compile.transform(model, call(SMALL))
    with torch.no_grad():
        dense = [model(**arguments) for arguments in calls]
        assert all(torch.equal(lazy(**arguments), result) for arguments, result in zip(calls, dense, strict=True))
        assert [(branch.name, branch.kind.value, branch.row_separable) for branch in lazy.branches] == [
            ("attn", "self_attention", True),
            ("mlp", "mlp", True),
        ]
        assert lazy.branches[1].macs == 2 * SMALL.shapes["x"][0] * 4 * WIDTH**2
        lazy.policy = CacheSchedule.every(2, steps=4, branches=2)
        for arguments in calls:
            lazy(**arguments)
        assert lazy.stats.lazy_ratio == 0.5
        assert torch.equal(model(**calls[0]), dense[0])
