"""An exported model called like the original, under a policy, so that a sampler cannot tell the difference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.runner import Force, Mask, Runner, Stream
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.config import LazyConfig
from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.policies.gate_table import GateRow
from lazy_compile.policies.policy import AlwaysCompute, Learned, Policy, Scheduled
from lazy_compile.runtime.artifact import fingerprint
from lazy_compile.runtime.stats import LazyStats
from lazy_compile.runtime.trajectory import Trajectories
from lazy_compile.tree_specs import load_tree_spec

logger = logging.getLogger("lazy_compile")

UNREAD = 64
"""Calls whose decisions may wait on the device to be counted."""


@dataclass
class _Place:
    """Where one stream of a trajectory stands.

    Attributes:
        computed_at: ``int64[branches]``, the step at which each branch computed.
        logits: of the step before.
    """

    stream: Stream
    computed_at: npt.NDArray[np.int64]
    last_step: int = -1
    logits: Tensor | None = None


class EngineDenoiser:
    """A runner of an exported model, called like the original.

    Trajectories and streams are distinguished by the timestep input, as in
    :class:`~lazy_compile.runtime.module.LazyModule`, and the decisions are the same as there with the ``batch_rule``
    and the groups that the model was exported with. Arguments that are not tensors were fixed by the export and are
    ignored.

    Args:
        runner: the exported model.
        policy: ``AlwaysCompute()``, ``Scheduled(schedule)`` or ``Learned(table)``. A model that does not decide itself
            takes ``Learned(table, delayed=True)``, and only if it was exported with predictors. None takes the one that
            the runner's model carries with it, if any.
        config: ``warmup_steps`` and ``max_reuse_age`` are taken from it; the rest was fixed by the export. None takes
            those that the model was exported with.

    Raises:
        ConfigError: the policy was made for another model, or asks what is not known before a step.
    """

    def __init__(self, runner: Runner, policy: Policy | None = None, config: LazyConfig | None = None) -> None:
        self.runner = runner
        self.config = config or LazyConfig(
            warmup_steps=runner.metadata.warmup_steps, max_reuse_age=runner.metadata.max_reuse_age
        )
        self._trajectories = Trajectories()
        self._unread: list[tuple[int, _Place, Mask | None, Tensor | None]] = []
        self._told: set[str] = set()
        self.policy = policy or runner.policy or AlwaysCompute()
        self.reset_stats()

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return self.runner.branches

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, AlwaysCompute | Scheduled | Learned):
            raise ConfigError(
                f"policy is {policy!r}; an exported model follows AlwaysCompute(), Scheduled(...) or Learned(...)"
            )
        policy.check(self.branches)
        if isinstance(policy, Learned):
            _check_gating(policy, self.runner.metadata)
        self._policy = policy
        self.reset()

    @property
    def stats(self) -> LazyStats:
        """What was reused since the last :meth:`reset_stats`; reading it waits for the device."""
        self._read()
        return self._stats

    def reset(self) -> None:
        """Forget all caches: the next call starts a trajectory."""
        self._trajectories.reset()

    def reset_stats(self) -> None:
        macs = np.array([branch.macs for branch in self.branches], dtype=np.float64)
        self._unread.clear()
        self._stats = LazyStats(macs, self.runner.metadata.total_macs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step; arguments and result are those of the original, or a plain tuple if its result type is
        not known here."""
        inputs = self._inputs(args, kwargs)
        name = self.runner.metadata.timestep_input
        timestep = None if name is None else float(inputs[name].max())
        stream, step, _ = self._trajectories.advance(timestep)
        state = stream.caches
        place = state.memory.get("engine")
        if not isinstance(place, _Place):
            place = _Place(self.runner.new_stream(), np.full(len(self.branches), step))
            state.memory["engine"] = place
        now, before = float(step) if timestep is None else timestep, state.timestep_before
        if (mismatch_reason := self._policy.mismatch_reason(step, now, before)) and mismatch_reason not in self._told:
            self._told.add(mismatch_reason)
            logger.warning("%s", mismatch_reason)
        row, force = self._decide(place, step, now, before)
        place.stream.skip(max(step - place.last_step - 1, 0))
        slopes = self._policy.slopes(step, now, before)
        outputs = self.runner.run(inputs, row, force, slopes=slopes, stream=place.stream)
        place.last_step, place.logits = step, self.runner.logits
        self._note(step, place)
        return self._result(outputs)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        names = self.runner.metadata.arguments
        if names:
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        layout, tensors = CallLayout.of(args, kwargs)
        return dict(zip(layout.names, tensors, strict=True))

    def _decide(self, place: _Place, step: int, timestep: float, before: float | None) -> tuple[GateRow | None, Force]:
        policy = self._policy
        row = policy.row(timestep, before) if isinstance(policy, Learned) else None
        force: list[bool | None] = [True] * len(self.branches)
        if step < self.config.warmup_steps or isinstance(policy, AlwaysCompute):
            return row, force
        if isinstance(policy, Scheduled):
            table = policy.schedule.should_compute
            force = table[step].tolist() if step < len(table) else force
        elif not policy.delayed:
            force = [None] * len(self.branches)
        elif place.logits is not None:
            force = self.runner.decided_by(None, place.logits).tolist()
        if self.config.max_reuse_age is not None:
            self._read()
            for index in np.flatnonzero(step - place.computed_at > self.config.max_reuse_age):
                force[index] = True
        return row, force

    def _note(self, step: int, place: _Place) -> None:
        """Put the decisions of a call aside, so that nobody waits for them before they are asked for."""
        self._stats.calls += 1
        self._unread.append((step, place, self.runner.fixed, self.runner.logits))
        if len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        for step, place, fixed, logits in self._unread:
            decisions = self.runner.decided_by(fixed, logits)
            place.computed_at[decisions] = step
            for index, computes in enumerate(decisions):
                self._stats.record(step, index, np.full(1 if logits is None else len(logits), computes))
        self._unread.clear()

    def _result(self, outputs: Sequence[Tensor]) -> Any:
        remaining = iter(outputs)
        leaves = [None if name is None else next(remaining) for name in self.runner.metadata.outputs]
        return tuple(leaves) if self._spec is None else pytree.tree_unflatten(leaves, self._spec)

    @cached_property
    def _spec(self) -> pytree.TreeSpec | None:
        """None for a return type that pytree cannot read here: outputs then come as a plain tuple."""
        return load_tree_spec(self.runner.metadata.output_spec, "the description of this model")


def check_same_model(metadata: OnnxMetadata, original: nn.Module, source: object) -> None:
    """
    Raises:
        ArtifactError: an exported model is that of another one, by the names and sizes of its parameters.
    """
    if metadata.fingerprint != fingerprint(original):
        raise ArtifactError(
            f"{source} was exported from another {one_line(metadata.model)} than this {type(original).__name__}: the "
            "names or sizes of their parameters differ; export this one"
        )


def _check_gating(policy: Learned, metadata: OnnxMetadata) -> None:
    """
    Raises:
        ConfigError: the policy knows what to do at another time than the model asks.
    """
    if metadata.gating == "predicate" and not policy.delayed:
        return
    if metadata.gating == "input" and metadata.predictors and policy.delayed:
        return
    kind = f"gating={metadata.gating!r}" + (" and no predictors" if not metadata.predictors else "")
    raise ConfigError(
        f"Learned(..., delayed={policy.delayed}) cannot steer a model that was exported with {kind}: export with "
        "gating='predicate' for Learned(...), with gating='input' and predictors for Learned(..., delayed=True), or "
        "use Scheduled(...)"
    )
