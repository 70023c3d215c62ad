"""Polygraphy: the iterations of `polygraphy run` are the steps of a trajectory."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from components import STEPS, denoiser, inputs, outputs
from polygraphy.tools import main

import lazy_compile
from lazy_compile.integrations.polygraphy import LazyRunner

lazy = lazy_compile.transform(denoiser(), inputs())
dense = outputs(lazy)
with tempfile.TemporaryDirectory() as folder:
    file = str(Path(folder) / "m.onnx")
    lazy_compile.export_onnx(lazy, file)
    # What the shell would run: polygraphy run m.onnx --lazy --lazy-every 2 --iterations 8
    main(["run", file, "--lazy", "--lazy-every", "2", "--iterations", str(STEPS), "--silent"])
    feeds = [{name: tensor.numpy() for name, tensor in inputs(step).items()} for step in range(STEPS)]
    with LazyRunner(file) as runner:
        computed = np.stack([runner.infer(feed)["output_0"] for feed in feeds])
    with LazyRunner(file, every=2) as runner:
        for feed in feeds:
            runner.infer(feed)
        ratio = runner.reused / (STEPS * len(lazy.branches))
print("equal while nothing is reused:", torch.allclose(torch.from_numpy(computed), dense, atol=1e-4))
print(f"lazy ratio {ratio:.2f}")
