"""accelerate: the processes that it starts share the work of a calibration, and find the gates of one."""

import os
import subprocess
import sys
from typing import Any

import torch
from accelerate import Accelerator
from components import STEPS, denoiser, inputs, outputs, show

import lazy_compile
from lazy_compile import CacheSchedule, CalibrationConfig, calibrate

# What the shell would run: accelerate launch --multi_gpu --num_processes 2 accelerate_launch.py
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


@torch.no_grad()
def sample(model: Any, seed: int) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(0, STEPS, 2):
        x = x - 0.1 * model(**{**inputs(step), "hidden_states": x}, return_dict=False)[0][:, :4]
    return x


def work() -> None:
    """What each of the processes does; trajectories is a multiple of their number."""
    accelerator = Accelerator()
    model = denoiser()
    lazy = lazy_compile.transform(model, inputs())
    computed = outputs(lazy)
    start = CacheSchedule.every(2, STEPS // 2, len(lazy.branches))
    calibrate(lazy, CalibrationConfig(target_lazy_ratio=0.4, iterations=1, trajectories=2), sample=sample, plan=start)
    lazy.reset_stats()
    images = accelerator.gather(sample(lazy, seed=77 + accelerator.process_index))
    if accelerator.is_main_process:
        print(f"{len(images)} images from {accelerator.num_processes} processes")
        show(outputs(model), computed, lazy)
    accelerator.end_training()


if "WORLD_SIZE" in os.environ:
    work()
else:
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, __file__]
    print(subprocess.run(command, env=on_cpu, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout)
