"""What planning takes of memory at full size: the planner runs on models without weights, and storages are counted.

Run is what a search consists of: a dense trajectory from which starts are made, one response with its way back, and one
candidate that is judged. What a search repeats many times takes no more memory than once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.bench.full_size_models import FULL_SIZE
from lazy_compile.bench.simulated_memory import SimulatedMemory, fused_attention
from lazy_compile.compiler import transform
from lazy_compile.config import Granularity
from lazy_compile.planning.estimate import estimate_plan
from lazy_compile.planning.output_store import Streaming
from lazy_compile.planning.replay import replayable, run_trajectory
from lazy_compile.planning.sample_response import measure_response
from lazy_compile.planning.search import final_error
from lazy_compile.planning.step_paths import StepCosts
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler

DEVICE, HOST = 80_000_000_000, 128_000_000_000
"""Bytes that a plan may take in all: of one GPU, the weights among them, and of its host."""


@dataclass(frozen=True)
class PlanSetting:
    """
    Attributes:
        model: in :data:`~lazy_compile.bench.full_size_models.FULL_SIZE`.
        granularity: of the decisions.
        steps: of the sampler.
        guided: whether each step calls the model twice, with a prompt and without.
    """

    model: str
    granularity: Granularity
    steps: int
    guided: bool = False


SETTINGS = (PlanSetting("FLUX.1-dev", "branch", 28), PlanSetting("Wan2.1-T2V-14B", 10, 50, guided=True))


@dataclass(frozen=True)
class PlanRow:
    """What making one plan takes; bytes are the most that there were at once.

    Attributes:
        granularity, steps, guided: see :class:`PlanSetting`.
        weight_bytes: of the model.
        keep: where outputs of branches lie, which the planner chose.
        repeat_branches: whether the planner chose to compute branches again on the way back.
        device_bytes, host_bytes, disk_bytes: simulated, beside the weights.
        estimated_device_bytes, estimated_host_bytes, estimated_disk_bytes: what the planner says before it starts.
        phases: for each part of a search the bytes on the device, at most.
        model_calls: evaluations of the model that a whole search makes, as it says before it starts.
        cpu_seconds: of one processor, that the simulation took.
    """

    model: str
    setting: str
    granularity: str
    steps: int
    guided: bool
    decisions: int
    weight_bytes: int
    keep: str
    repeat_branches: bool
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    estimated_device_bytes: int
    estimated_host_bytes: int
    estimated_disk_bytes: int
    phases: dict[str, int]
    model_calls: int
    cpu_seconds: float

    @property
    def fits(self) -> bool:
        return self.weight_bytes + self.device_bytes <= DEVICE and self.host_bytes <= HOST


def plan_lines(rows: Iterable[PlanRow]) -> list[str]:
    """The figures as Markdown."""
    lines = [
        "What planning takes, simulated: the planner itself runs on the meta device, where the storages of all tensors",
        "are counted. Run is a dense trajectory, one response with its way back, and one candidate that is judged, at",
        f"batch 1, by a planner that may take {DEVICE / 1e9:.0f} GB of a device, weights included, and "
        f"{HOST / 1e9:.0f} GB of its host. Bytes are the most",
        "that there were at once, beside the weights; *said* is what `plan --dry-run` says before. What kernels take",
        "while they run, and what an allocator leaves unused, is not counted. *Calls* are those of a whole search.",
        "",
        "| model | at | steps | granularity | decisions | weights | outputs on | device | said | host | said | disk "
        "| calls | fits |",
        "|---" * 14 + "|",
    ]
    for row in rows:
        steps = f"{row.steps}, guided" if row.guided else str(row.steps)
        kept = f"{row.keep}, branches repeated" if row.repeat_branches else row.keep
        lines.append(
            f"| {row.model} | {row.setting} | {steps} | {row.granularity} | {row.decisions} | "
            f"{_gigabytes(row.weight_bytes)} | {kept} | {_gigabytes(row.device_bytes)} | "
            f"{_gigabytes(row.estimated_device_bytes)} | {_gigabytes(row.host_bytes)} | "
            f"{_gigabytes(row.estimated_host_bytes)} | {_gigabytes(row.disk_bytes)} | {row.model_calls} | "
            f"{'yes' if row.fits else 'no'} |"
        )
    return lines


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def measure_plan(setting: PlanSetting, on_progress: OnProgress = no_progress, **changes: Any) -> PlanRow:
    """Simulate a plan of one model, with these changes to its configuration."""
    begun = time.process_time()
    full_size = FULL_SIZE[setting.model]
    model, inputs = full_size.build(**changes)
    lazy = transform(model, inputs, granularity=setting.granularity)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sample = euler_steps(inputs, next(iter(full_size.shapes)), setting.steps, setting.guided)
    with fused_attention():
        estimate = estimate_plan(lazy, sample, max_memory=DEVICE - weights, max_host_memory=HOST)
    memory, phases = simulate(lazy, sample, estimate.steps, estimate.streaming, on_progress)
    return PlanRow(
        setting.model, full_size.setting, str(setting.granularity), setting.steps, setting.guided, len(lazy.branches),
        weights, estimate.streaming.keep, estimate.streaming.repeat_branches, memory.peak["device"],
        memory.peak["host"], memory.peak["disk"], estimate.device_bytes, estimate.host_bytes, estimate.disk_bytes,
        phases, estimate.model_calls, time.process_time() - begun,
    )  # fmt: skip


def euler_steps(inputs: dict[str, Any], latents: str, steps: int, guided: bool) -> Sampler:
    """A sampler for the meta device, where a call has no values that tell its trajectory and step.

    Args:
        inputs: of a call.
        latents: which of them.
        steps: calls, or pairs of calls.
        guided: whether the model is called twice at each step, and its answers are combined.
    """
    streams = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        for _ in range(2 if guided else 1)
    ]

    def sample(denoiser: LazyModule, seed: int) -> Tensor:
        x: Tensor = inputs[latents].clone()
        with torch.no_grad():
            for step in range(steps):
                velocities = []
                for key, given in enumerate(streams):
                    with denoiser.trajectory(key, step=step):
                        velocities.append(pytree.tree_leaves(denoiser(**{**given, latents: x}))[0])
                velocity, *others = velocities
                for other in others:
                    velocity = other + 5.0 * (velocity - other)
                x = x - velocity / steps
        return x

    return sample


def simulate(
    lazy: LazyModule, sample: Sampler, steps: int, streaming: Streaming, on_progress: OnProgress = no_progress
) -> tuple[SimulatedMemory, dict[str, int]]:
    """What the parts of a search take, and for each the most bytes on the device.

    Args:
        lazy: on the meta device, captured.
        sample: as for a plan.
        steps: of its trajectory.
        streaming: how memory is spared.
    """
    memory, phases = SimulatedMemory(lazy.graph.state()), {}
    reuses = CacheSchedule.every(2, steps, len(lazy.branches))
    streaming = replace(streaming, open_file=memory.open_file)

    def dense_start() -> None:
        always = CacheSchedule.always_compute(steps, len(lazy.branches))
        StepCosts.of([run_trajectory(replayable(lazy), sample, 0, always, keep_every=0)], linear=True)

    parts: dict[str, Callable[[], object]] = {
        "dense start": dense_start,
        "response": lambda: measure_response(lazy, sample, reuses, seed=0, streaming=streaming),
        "judged candidate": lambda: final_error(lazy, sample, reuses, 0),
    }
    most = 0
    for done, (name, run) in enumerate(parts.items()):
        on_progress("simulating a plan", done, len(parts), name)
        memory.peak["device"] = memory.held["device"]
        with _no_garbage_collector(), fused_attention(), memory:
            run()
        phases[name] = memory.peak["device"]
        most = max(most, phases[name])
    memory.peak["device"] = most
    return memory, phases


@contextmanager
def _no_garbage_collector() -> Iterator[None]:
    """What waits for it is seen, and the figures are the same in every run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
