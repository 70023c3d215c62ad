"""Transformers of diffusers, exported to ONNX, against PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lazy_compile
from lazy_compile import Learned
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from support.lowering import STEPS, random_gates
from support.toy_models import randomize

TOLERANCE = 1e-4


def small_dit() -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 1, "out_channels": 1, "num_layers": 2}
    model = DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    return model, {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }


def small_sd3() -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    width = {"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 64}
    return SD3Transformer2DModel(**sizes, **width, sample_size=8, patch_size=1), {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([5, 5]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_dit, small_sd3])
@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_a_model_of_diffusers_follows_pytorch(make: Callable[[], Any], reuse: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, arguments = make()
    lazy = lazy_compile.transform(randomize(model).eval(), arguments, reuse=reuse, batch_rule="all_reuse")
    report = export_onnx(lazy, tmp_path / "m.onnx")
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx", threads=1), config=lazy.lazy_config)
    steps = torch.arange(STEPS, 0, -1)
    policy = Learned(random_gates(lazy, steps.double()))
    for step in steps:
        call_now = {**arguments, "timestep": step.repeat(2), "hidden_states": arguments["hidden_states"] * step / STEPS}
        if step == STEPS:
            lazy.policy = denoiser.policy = policy
            lazy.reset_stats()
        with torch.no_grad():
            seen, expected = denoiser(**call_now).sample, lazy(**call_now).sample
        torch.testing.assert_close(seen, expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(denoiser.stats.reuse_table, lazy.stats.reuse_table)
    assert (report.if_nodes, report.heavy_ops_outside_if) == (len(lazy.branches), ())
