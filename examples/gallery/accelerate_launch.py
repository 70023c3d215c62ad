"""accelerate: the processes that it starts share the work of a calibration, and find the gates of one."""

import os
import subprocess
import sys
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel

import lazy_compile
from lazy_compile import CacheSchedule, CalibrationConfig, calibrate

# What the shell would run: accelerate launch --multi_gpu --num_processes 2 accelerate_launch.py
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


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


@torch.no_grad()
def sample(model: Any, seed: int) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(0, 8, 2):
        x = x - 0.1 * model(**{**inputs(step), "hidden_states": x}, return_dict=False)[0][:, :4]
    return x


def work() -> None:
    """What each of the processes does; trajectories is a multiple of their number."""
    accelerator = Accelerator()
    lazy = lazy_compile.transform(model, inputs(0))
    computed = outputs(lazy)
    start = CacheSchedule.every(2, 4, len(lazy.branches))
    calibrate(lazy, CalibrationConfig(target_lazy_ratio=0.4, iterations=1, trajectories=2), sample=sample, plan=start)
    lazy.reset_stats()
    images = accelerator.gather(sample(lazy, seed=77 + accelerator.process_index))
    if accelerator.is_main_process:
        print(f"{len(images)} images from {accelerator.num_processes} processes")
        print("equal while nothing is reused:", torch.equal(outputs(model), computed))
        print(f"lazy ratio {lazy.stats.lazy_ratio:.2f}, compute ratio {lazy.stats.compute_ratio:.2f}")
    accelerator.end_training()


if "WORLD_SIZE" in os.environ:
    work()
else:
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, __file__]
    print(subprocess.run(command, env=on_cpu, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout)
