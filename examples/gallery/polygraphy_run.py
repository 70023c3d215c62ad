"""Polygraphy: the iterations of `polygraphy run` are the steps of a trajectory."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from polygraphy.tools import main

import lazy_compile
from lazy_compile.integrations.polygraphy import LazyRunner

torch.manual_seed(0)
model = DiTTransformer2DModel(  # small and random; yours is DiTTransformer2DModel.from_pretrained(...)
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
    patch_size=2, num_embeds_ada_norm=1000,
).eval()  # fmt: skip
noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])


def inputs(step: int) -> dict[str, Any]:
    return {"hidden_states": noise, "timestep": torch.full((2,), 900 - 100 * step), "class_labels": labels}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Eight steps of a trajectory."""
    return torch.stack([model(**inputs(step), return_dict=False)[0] for step in range(8)])


dense = outputs(model)
lazy = lazy_compile.transform(model, inputs(0))
with tempfile.TemporaryDirectory() as folder:
    file = str(Path(folder) / "m.onnx")
    lazy_compile.export_onnx(lazy, file)
    # What the shell would run: polygraphy run m.onnx --lazy --lazy-every 2 --iterations 8
    main(["run", file, "--lazy", "--lazy-every", "2", "--iterations", "8", "--silent"])
    feeds = [{name: tensor.numpy() for name, tensor in inputs(step).items()} for step in range(8)]
    with LazyRunner(file) as runner:
        computed = np.stack([runner.infer(feed)["output_0"] for feed in feeds])
    with LazyRunner(file, every=2) as runner:
        for feed in feeds:
            runner.infer(feed)
        ratio = runner.reused / (8 * len(lazy.branches))
print("equal while nothing is reused:", torch.allclose(torch.from_numpy(computed), dense, atol=1e-4))
print(f"lazy ratio {ratio:.2f}")
