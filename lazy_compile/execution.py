"""One trajectory of a lazy model in any runtime, beside the dense model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazy_compile.backends.runner import Runner
from lazy_compile.integrations.engine_module import EngineModule
from lazy_compile.policies.policy import Policy, Scheduled
from lazy_compile.processes import Processes
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.stats import LazyStats


@dataclass(frozen=True)
class RunReport:
    """What a trajectory gave and what it took.

    Attributes:
        samples: float[B, ...], those of all processes in the order of their ranks.
        seconds: of the lazy trajectory.
        dense_seconds: of the original model's in PyTorch, on the same device; None where it was not asked for.
        policy: who decided.
        stats: what was reused, summed over all processes.
        cache_bytes: held at the end.
    """

    samples: Tensor
    seconds: float
    dense_seconds: float | None
    policy: Policy
    stats: LazyStats
    cache_bytes: int

    @property
    def unused_steps(self) -> int:
        """How many rows of the schedule lie behind the end of the trajectory."""
        steps = self.policy.schedule.steps if isinstance(self.policy, Scheduled) else 0
        return max(0, steps - len(self.stats.evaluated))


class _Stop(BaseException):
    """Ends a trajectory after its first call."""


def run(
    lazy: LazyModule,
    sample: Callable[[Any, int], Tensor],
    *,
    runner: Runner | None = None,
    follow_runner: bool = False,
    seed: int = 0,
    dense: bool = True,
) -> RunReport:
    """Sample a trajectory and time it, beside one of the dense model.

    Args:
        lazy: a captured model; its statistics are of this trajectory afterwards.
        sample: ``(denoiser, seed) -> samples``.
        runner: an exported model to run instead, from :func:`lazy_compile.backends.open_runner.open_runner`.
        follow_runner: keep the policy that was exported with ``runner``; else it is that of ``lazy``.
        seed: of the noise; each process of a group takes the next.
        dense: also time the original model, with the same noise.
    """
    processes = Processes.beside(lazy.graph.collective_groups)
    denoiser: Any = lazy
    if runner is not None:
        denoiser = EngineModule(
            runner, like=lazy.original, policy=None if follow_runner else lazy.policy, config=lazy.lazy_config
        )
    mine = seed + processes.rank
    dense_seconds = None
    if dense:
        _warm_up(lazy.original, sample, mine)
        dense_seconds = _timed(lazy.original, sample, mine)[1]
    denoiser.reset_stats()
    samples, seconds = _timed(denoiser, sample, mine)
    stats = denoiser.stats
    stats.reused, stats.evaluated = processes.sum(torch.tensor(np.stack([stats.reused, stats.evaluated]))).numpy()
    cached = lazy.cache_bytes if runner is None else sum(stream.bytes for stream in runner.streams)
    return RunReport(processes.gather(samples), seconds, dense_seconds, denoiser.policy, stats, cached)


def _timed(denoiser: Any, sample: Callable[[Any, int], Tensor], seed: int) -> tuple[Tensor, float]:
    start = time.perf_counter()
    with torch.no_grad():
        samples = sample(denoiser, seed)
        if samples.is_cuda:
            torch.cuda.synchronize(samples.device)
    return samples, time.perf_counter() - start


def _warm_up(model: Any, sample: Callable[[Any, int], Tensor], seed: int) -> None:
    """One call: what a first call costs is of no trajectory."""

    def stop(*_: Any) -> None:
        raise _Stop

    hook = model.register_forward_hook(stop)
    with torch.no_grad():
        try:
            sample(model, seed)
        except _Stop:
            return
        finally:
            hook.remove()
