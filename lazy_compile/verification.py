"""Does a lazy model do what the original does? Each question is a :class:`Check` that can fail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.config import LazyConfig
from lazy_compile.errors import VerificationError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.policy import AlwaysCompute, Policy, Scheduled
from lazy_compile.policies.schedule import BoolTable, CacheSchedule
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.runtime.sampling import Sampler

REPLAY_TOLERANCE = 1e-5
"""Between the runtime and a plain replay of a schedule, relative to the largest output; wider for narrower dtypes."""


ONNX_TOLERANCE = 1e-4
"""Between the samples of ONNX Runtime and of PyTorch after a whole trajectory."""


@dataclass(frozen=True)
class Check:
    """One question, its answer, and what was expected."""

    name: str
    passed: bool
    seen: str
    expected: str


@dataclass(frozen=True)
class Comparison:
    """The answers to all questions."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """
        Raises:
            VerificationError: a check failed.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            first = failed[0]
            raise VerificationError(
                f"{len(failed)} of {len(self.checks)} checks failed; {first.name}: seen {first.seen}, expected "
                f"{first.expected}; do not use this model before the cause is found"
            )


def compare(
    lazy: LazyModule, sample: Sampler, *, onnx: str | Path | None = None, seed: int = 0, lazy_ratio: float = 0.5
) -> Comparison:
    """Hold a lazy model against its original, on whole trajectories.

    1. While everything computes, every output is bitwise that of the original.
    2. Under a random schedule the decisions are the schedule's, and every output is that of a plain replay which shares
       no code with the runtime.
    3. Under the model's own policy the samples are finite.
    4. With ``onnx``: one ``If`` per branch, no heavy operator outside an arm, and ONNX Runtime follows PyTorch over the
       whole trajectory.

    Args:
        lazy: a captured lazy model; its policy is the same afterwards.
        sample: runs a trajectory by calling what it is given.
        onnx: what :func:`lazy_compile.export_onnx` wrote for this model.
        seed: of the noise and of the random schedule.
        lazy_ratio: of the random schedule.
    """
    with _borrowed(lazy) as policy:
        checks = [_computes_like_the_original(lazy, sample, seed)]
        steps = len(lazy.stats.evaluated)
        schedule = CacheSchedule.random(lazy_ratio, steps, len(lazy.branches), seed)
        schedule = schedule.tied(lazy.graph.leaders(lazy.lazy_config.group))
        checks += _follows_a_schedule(lazy, sample, schedule, seed)
        policies: list[Policy] = [Scheduled(schedule)]
        if policy != AlwaysCompute():
            checks.append(_stays_finite(lazy, sample, policy, seed))
            policies.append(policy)
        if onnx is not None:
            checks += _exported_like(lazy, sample, Path(onnx), policies, seed)
        return Comparison(tuple(checks))


def _computes_like_the_original(lazy: LazyModule, sample: Sampler, seed: int) -> Check:
    lazy.policy = AlwaysCompute()
    lazy.reset_stats()
    _, expected = _record(lazy.original, sample, seed)
    _, seen = _record(lazy, sample, seed)
    same = len(seen) == len(expected) and all(map(torch.equal, seen, expected))
    return Check(
        "always compute",
        same,
        "bitwise equal" if same else f"largest difference {_largest_difference(seen, expected):.3g}",
        f"the original's {len(expected)} outputs, bitwise",
    )


def _follows_a_schedule(lazy: LazyModule, sample: Sampler, schedule: CacheSchedule, seed: int) -> list[Check]:
    lazy.policy = Scheduled(schedule)
    lazy.reset_stats()
    replay = _Replay(schedule.should_compute, lazy.lazy_config)
    differences, tolerance = [0.0], REPLAY_TOLERANCE

    def run_both(call: ModelCall) -> Any:
        """Each call is compared alone, since a sampler would amplify what is rounded otherwise."""
        nonlocal tolerance
        leaders = call.graph.leaders(lazy.lazy_config.group)
        step = PolicyStep(lazy.policy, lazy.lazy_config, call.caches, call.groups, leaders=leaders)
        result = call.run(step)
        step.record(lazy.stats)
        seen, expected = _tensors(result), replay.run(call)
        scale = max(float(tensor.abs().max()) for tensor in expected) or 1.0
        tolerance = max(tolerance, *(8 * torch.finfo(tensor.dtype).eps for tensor in expected))
        differences.append(_largest_difference(seen, expected) / scale)
        return result

    with lazy.call_handler(run_both), torch.no_grad():
        sample(lazy, seed)
    followed = np.zeros_like(replay.reused)
    table = lazy.stats.reuse_table[: len(followed)]  # shorter where samples that are not finite ended the trajectory
    followed[: len(table)] = table
    wrong = int(np.count_nonzero(followed != replay.reused))
    worst = float(np.max(differences))
    return [
        Check("schedule: decisions", wrong == 0, f"{wrong} differ", f"all {schedule.should_compute.size} as scheduled"),
        Check(
            "schedule: outputs",
            worst <= tolerance,
            f"relative difference {worst:.2g}",
            f"at most {tolerance:.2g} from a plain replay",
        ),
    ]


def _stays_finite(lazy: LazyModule, sample: Sampler, policy: Policy, seed: int) -> Check:
    lazy.policy = policy
    lazy.reset_stats()
    samples, _ = _record(lazy, sample, seed)
    finite = bool(torch.isfinite(samples).all())
    return Check(
        f"policy {type(policy).__name__}",
        finite,
        f"{'finite' if finite else 'not finite'}, reuse {lazy.stats.lazy_ratio:.1%}",
        "finite samples",
    )


def _exported_like(
    lazy: LazyModule, sample: Sampler, path: Path, policies: Sequence[Policy], seed: int
) -> Iterator[Check]:
    from lazy_compile.backends.denoiser import check_same_model
    from lazy_compile.backends.onnx.structure import check_structure
    from lazy_compile.backends.onnxruntime.runner import OnnxRunner
    from lazy_compile.integrations.engine_module import EngineModule

    structure = check_structure(path)
    expected = f"{len(lazy.branches)} If nodes and no heavy operator outside"
    seen = "; ".join(structure.problems) or f"{structure.if_nodes} If nodes"
    sound = not structure.problems and structure.branches == len(lazy.branches)
    yield Check("ONNX: structure", sound, seen, expected)
    runner = OnnxRunner(path)
    check_same_model(runner.metadata, lazy.original, path)
    lazy.lazy_config = replace(lazy.lazy_config, batch_rule=runner.metadata.batch_rule)
    for policy in policies:
        lazy.policy = policy
        lazy.reset_stats()
        denoiser = EngineModule(runner, like=lazy.original, policy=policy, config=lazy.lazy_config)
        with torch.no_grad():
            there, here = sample(denoiser, seed), sample(lazy, seed)  # type: ignore[arg-type]
        wrong = int(np.count_nonzero(denoiser.stats.reuse_table != lazy.stats.reuse_table))
        difference = _largest_difference([there], [here])
        yield Check(
            f"ONNX Runtime: {type(policy).__name__}",
            wrong == 0 and difference <= ONNX_TOLERANCE,
            f"{wrong} decisions differ, samples by {difference:.2g}",
            f"the same decisions, samples within {ONNX_TOLERANCE:g} of PyTorch",
        )


@dataclass
class _Replay:
    """Follows a table of decisions with caches of its own: a plain loop to hold the runtime against."""

    should_compute: BoolTable
    config: LazyConfig
    streams: dict[int, tuple[object, dict[int, list[tuple[int, tuple[Tensor, ...]]]]]] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        self.reused = np.zeros(self.should_compute.shape)

    def run(self, call: ModelCall) -> list[Tensor]:
        # The stream is kept alive beside its history, so that its id stays its own.
        _, self.history = self.streams.setdefault(id(call.caches), (call.caches, {}))
        self.step = call.step
        return call.run_flat(self)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index, step = branch.branch.index, self.step
        history = self.history.setdefault(index, [])
        limit = self.config.max_reuse_age
        due = not history or step < self.config.warmup_steps or (limit is not None and step - history[-1][0] > limit)
        if due or step >= len(self.should_compute) or self.should_compute[step, index]:
            outputs = branch.compute(inputs)
            history.append((step, branch.kept(inputs, outputs)))
            return outputs
        self.reused[step, index] = 1.0
        known = history[-self.config.values_kept :]
        weights = [math.prod((step - other) / (at - other) for other, _ in known if other != at) for at, _ in known]
        values = zip(*(kept for _, kept in known), strict=True)
        reused = [sum(weight * value for weight, value in zip(weights, each, strict=True)) for each in values]
        return branch.restored(inputs, reused)


@contextmanager
def _borrowed(lazy: LazyModule) -> Iterator[Policy]:
    policy, config = lazy.policy, lazy.lazy_config
    try:
        yield policy
    finally:
        lazy.policy, lazy.lazy_config = policy, config
        lazy.reset_stats()


def _record(model: nn.Module, sample: Sampler, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The samples, and every tensor that the model returned on the way."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, result: Any) -> None:
        outputs.extend(tensor.detach().clone() for tensor in _tensors(result))

    hook = model.register_forward_hook(keep)
    if isinstance(model, LazyModule):
        model.reset()
    try:
        with torch.no_grad():
            samples = sample(model, seed)  # type: ignore[arg-type]
    finally:
        hook.remove()
    return samples, outputs


def _largest_difference(seen: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if len(seen) != len(expected):
        return float("inf")
    differences = [float((a.double() - b.double()).abs().max()) for a, b in zip(seen, expected, strict=True)]
    return float(np.max(differences, initial=0.0))  # unlike max(), it keeps a NaN


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
