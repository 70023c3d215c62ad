"""What each single reuse costs: its effect on the final sample, measured on the model's own trajectories."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.errors import ConfigError
from lazy_compile.policies.policy import GateQuery, Policy
from lazy_compile.processes import Processes
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.runtime.sampling import DenseStep, Sampler, require_finite

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EffectTable:
    """The cost of reusing one branch at one step of an otherwise dense trajectory.

    Attributes:
        final: ``float64[T, G]``, mean squared change of the final samples; NaN at step 0, where nothing can be reused.
        output: ``float64[T, G]``, mean squared change of the model's output at that step.
        timesteps: ``float64[T]``, the time input at each step.
        branch_macs: ``float64[G]``.
        total_macs: MACs of one dense evaluation.
    """

    final: Floats
    output: Floats
    timesteps: Floats
    branch_macs: Floats
    total_macs: int

    @property
    def sensitivity(self) -> Floats:
        """``float64[T]``: change of the final sample per change of the model's output at a step."""
        final, output = np.nan_to_num(self.final).sum(axis=1), np.nan_to_num(self.output).sum(axis=1)
        gain: Floats = np.divide(final, output, out=np.zeros_like(final), where=output > 0)
        gain[0] = gain[1] if len(gain) > 1 else 1.0
        return gain


def measure_effects(
    lazy: LazyModule, sample: Sampler, *, seed: int = 0, on_progress: OnProgress = no_progress
) -> EffectTable:
    """Reuse every branch at every step, one at a time, and finish each trajectory.

    For T steps and G branches this takes about ``G * T**2 / 2`` evaluations of the model; the part of a trajectory
    before the reuse is replayed from memory. Several processes share the branches.

    Raises:
        ConfigError: the sampler runs fewer than two steps, or its samples are not finite.
    """
    recording = _Recording()
    dense = _sample(lazy, sample, seed, recording)
    steps, branches = len(recording.timesteps), len(lazy.branches)
    if steps < 2:
        raise ConfigError(f"the sampler ran {steps} step(s) of the model; at least 2 are needed to reuse anything")
    require_finite(dense)
    final = np.full((steps, branches), np.nan)
    output = np.full((steps, branches), np.nan)
    processes = Processes.beside(lazy.graph.collective_groups)
    mine = processes.share(range(branches))
    before: dict[int, CacheState] = {}
    for step in range(steps):
        following: dict[int, CacheState] = {}
        for position, branch in enumerate(mine if step else mine[:1]):
            probe = _Probe(recording, lazy, step, branch, before, following)
            changed = _sample(lazy, sample, seed, probe)
            if step:
                final[step, branch] = _mean_square(changed, dense)
                output[step, branch] = probe.change
                on_progress("measuring effects", (step - 1) * len(mine) + position + 1, (steps - 1) * len(mine))
        before = following
    if processes.count > 1:
        final[1:], output[1:] = processes.sum(torch.from_numpy(np.nan_to_num([final[1:], output[1:]]))).numpy()
    graph = lazy.graph
    macs = np.array([branch.macs for branch in graph.program.branches], dtype=np.float64)
    return EffectTable(final, output, np.array(recording.timesteps), macs, graph.total_macs)


def _sample(lazy: LazyModule, sample: Sampler, seed: int, driver: Callable[[ModelCall], Any]) -> Tensor:
    with torch.no_grad(), lazy.call_handler(driver):
        return sample(lazy, seed).clone()  # a sampler may write its next samples to the same memory


@dataclass
class _Recording:
    """A dense trajectory: what the model returned at each call, and the time of each step."""

    outputs: list[Any] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)

    def __call__(self, call: ModelCall) -> Any:
        result = call.run(DenseStep())
        self.outputs.append(_copy(result))
        if call.step == len(self.timesteps):
            self.timesteps.append(call.timestep)
        return result


@dataclass
class _Probe:
    """Replays a recording up to ``step``, reuses one branch there, and is dense afterwards.

    ``following`` receives the caches that a dense evaluation of ``step`` leaves, so that the next step can be probed.
    """

    recording: _Recording
    lazy: LazyModule
    step: int
    branch: int
    before: dict[int, CacheState]
    following: dict[int, CacheState]
    change: float = 0.0
    calls: int = 0
    stream: int = 0

    def __call__(self, call: ModelCall) -> Any:
        position = self.calls
        self.calls += 1
        if call.step < self.step:
            return _copy(self.recording.outputs[position])
        if call.step > self.step:
            return call.run(DenseStep())
        stream = self.stream
        self.stream += 1
        if stream not in self.following:
            self.following[stream] = self._caches(stream)
            call.run(self._with_policy(_ReuseOne(None), self.following[stream], call))
        result = call.run(self._with_policy(_ReuseOne(self.branch), self._caches(stream), call))
        self.change += _mean_square(_floats(result), _floats(self.recording.outputs[position]))
        return result

    def _caches(self, stream: int) -> CacheState:
        known = self.before.get(stream, CacheState())
        return CacheState({index: copy.copy(slot) for index, slot in known.slots.items()})

    def _with_policy(self, policy: Policy, caches: CacheState, call: ModelCall) -> PolicyStep:
        config = replace(self.lazy.lazy_config, warmup_steps=1, max_reuse_age=None)
        return PolicyStep(policy, config, caches, call.groups)


@dataclass(frozen=True)
class _ReuseOne(Policy):
    """Reuses one branch, or none so far. Which comes next is not known, so that all are cached."""

    branch: int | None

    def should_compute(self, query: GateQuery) -> bool:
        return query.branch.index != self.branch


def _copy(result: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)


def _floats(result: Any) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.flatten() for leaf in leaves])


def _mean_square(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).square().mean())
