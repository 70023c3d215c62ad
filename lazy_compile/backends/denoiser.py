"""An exported model called like the original, under a policy, so that a sampler cannot tell the difference."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.backends.onnx.metadata import BATCH, OnnxMetadata
from lazy_compile.backends.onnx.sizes import names_in, shape_at
from lazy_compile.backends.runner import Force, Runner
from lazy_compile.backends.stream import Mask, Stream, StreamSnapshot
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.config import MAX_ORDER, LazyConfig
from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.extrapolation import difference_names
from lazy_compile.planning.replay import Driver, Replayable
from lazy_compile.policies.gate_table import GateRow
from lazy_compile.policies.policy import GATES, AlwaysCompute, Policy, Scheduled, spread
from lazy_compile.policies.presets import PolicyLike, as_policy
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.artifact import fingerprint
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.fingerprint import Latents, Shape, moving_along, moving_beside, moving_pair
from lazy_compile.runtime.host_hints import current_stream
from lazy_compile.runtime.model_call import groups_of
from lazy_compile.runtime.placed_call import Placed
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


@dataclass(frozen=True)
class _Kept:
    """What a :class:`_Place` held."""

    stream: StreamSnapshot
    computed_at: npt.NDArray[np.int64]
    last_step: int


@dataclass(frozen=True)
class _EngineCall:
    """A call that a driver answers; implements :class:`~lazy_compile.planning.replay.ReplayableCall`."""

    denoiser: EngineDenoiser
    inputs: Mapping[str, Tensor]
    placed: Placed

    @property
    def step(self) -> int:
        return self.placed.step

    def follow(self, schedule: CacheSchedule) -> tuple[Tensor, ...]:
        return self.denoiser._follow(Scheduled(schedule), self.inputs, self.placed)

    def computed(self) -> dict[int, list[Tensor]]:
        self.denoiser._read()
        place = self.placed.state.memory["engine"]
        assert isinstance(place, _Place)
        result: dict[int, list[Tensor]] = {}
        for name, (read, _) in place.stream.buffers.items():
            kind, *numbers = name.split("_")
            if kind == "cache" and place.computed_at[int(numbers[0])] == place.last_step:
                result.setdefault(int(numbers[0]), []).append(read)
        return result

    def state(self) -> _Kept | None:
        place = self.placed.state.memory.get("engine")
        if not isinstance(place, _Place):
            return None
        return _Kept(place.stream.snapshot(), place.computed_at.copy(), place.last_step)

    def restore(self, state: _Kept) -> None:
        stream = self.denoiser.runner.new_stream()
        stream.restore(state.stream)
        self.placed.state.memory["engine"] = _Place(
            stream, state.computed_at.copy(), state.last_step, state.stream.logits
        )


class EngineDenoiser:
    """A runner of an exported model, called like the original.

    Calls are distinguished by what they hold, as in :class:`~lazy_compile.runtime.module.LazyModule`. A batch whose
    rows moved or were left out goes on with the caches of its rows, if every branch is separable by rows; one with a
    row from elsewhere computes. The decisions are those of the ``batch_rule`` and the groups that the model was
    exported with. Arguments that are not tensors were fixed by the export and are ignored.

    Args:
        runner: the exported model.
        policy: what knows its decisions before a step, such as ``Scheduled(schedule)``, a schedule or the name of a
            preset; or ``Learned(table)``. A model that does not decide itself takes ``Learned(table, delayed=True)``,
            and only if it was exported with predictors. None takes the one that the model's file carries.
        config: ``warmup_steps`` and ``max_reuse_age`` are taken from it; the rest was fixed by the export. None takes
            those that the model was exported with.

    Raises:
        ConfigError: the policy was made for another model, or asks what is not known before a step.
        ArtifactError: the policy of the file is of a kind that is not defined in this process.
    """

    def __init__(self, runner: Runner, policy: PolicyLike | None = None, config: LazyConfig | None = None) -> None:
        self.runner = runner
        self.config = config or LazyConfig(
            warmup_steps=runner.metadata.warmup_steps, max_reuse_age=runner.metadata.max_reuse_age
        )
        self._trajectories = Trajectories()
        self._unread: list[tuple[int, _Place, Mask | None, Tensor | None]] = []
        self._counting = threading.RLock()
        self._policy_number = 0
        self._told: set[str] = set()
        self._driver: Driver | None = None
        self.policy = self._own_policy() if policy is None else policy

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return self.runner.branches

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, given: PolicyLike) -> None:
        policy = as_policy(given)
        policy.check(self.branches)
        if reason := self.runner.metadata.refusal(policy):
            raise ConfigError(reason)
        self._policy = policy
        self._policy_number += 1
        logger.info("exported %s: %s", self.runner.metadata.model, policy.describe())
        self.reset()
        self.reset_stats()

    def _own_policy(self) -> Policy:
        """What the file says."""
        if self.runner.policy is None:
            logger.warning(
                "the exported %s carries no policy, as files of earlier releases do not: every branch computes; give "
                "one, or export it again", self.runner.metadata.model,
            )  # fmt: skip
        return self.runner.policy or AlwaysCompute()

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
        placed = self._place(inputs)
        try:
            outputs = self._run(inputs, placed)
        except BaseException:
            self._trajectories.abandon(placed)
            raise
        names = [spec.name for spec in self.runner.metadata.inputs]
        self._trajectories.commit(placed, {} if self._latents is None else self._latents.returned(outputs, names))
        return self._result(outputs)

    def _place(self, inputs: Mapping[str, Tensor]) -> Placed:
        """Rows lie on axis 0; all of them together continue a call, or none does."""
        metadata, latents = self.runner.metadata, self._latents
        names = [spec.name for spec in metadata.inputs]
        rows = 1 if latents is None or latents.row_axis is None else len(inputs[names[latents.position]])
        named = {
            key: (tensor, 0 if tensor.dim() and len(tensor) == rows and rows > 1 else None)
            for key, tensor in inputs.items()
        }
        context = (current_stream(), self._policy_number)
        contents = self._trajectories.identify(named, latents, names, metadata.timestep_input, rows, context)
        return self._trajectories.place(contents, ())

    @cached_property
    def _latents(self) -> Latents | None:
        """The input that an output has the shape of, or all but one size of it; else the largest one that is no whole
        number, as for a ControlNet. In the example call of the export."""
        metadata = self.runner.metadata
        names = [name for name in metadata.outputs if name is not None]
        shapes = [shape_at(spec.shape, metadata.example) for spec in metadata.inputs]
        inputs = [
            None if spec.name == metadata.timestep_input or "float" not in spec.dtype else shape
            for spec, shape in zip(metadata.inputs, shapes, strict=True)
        ]
        outputs = [self.runner.output_shape(name, metadata.example) for name in names]
        found = moving_pair(inputs, outputs)
        if found is None:
            sized = [(math.prod(shape[1:]), -place) for place, shape in enumerate(inputs) if shape and len(shape) > 1]
            return Latents(-max(sized)[1], 0) if sized else None
        position, index, axis = found
        if not axis:
            others = moving_along([spec.name for spec in metadata.inputs], inputs, outputs, position, index)
            length = metadata.inputs[position].shape[0]
            packed = isinstance(length, str) and BATCH not in names_in(length)  # tokens of several images in one row
            rows = None if others or packed else 0
            latents = Latents(position, rows, index, rows, others=others)
        else:
            latents = self._moved(position, index, axis, shapes, outputs)
        if latents.row_axis is None:
            return latents
        beside = moving_beside(inputs, outputs, latents)
        return replace(latents, companions=tuple(self._moved(*pair, shapes, outputs) for pair in beside))

    @staticmethod
    def _moved(
        position: int,
        index: int,
        axis: int | None,
        inputs: Sequence[Shape],
        outputs: Sequence[Shape],
    ) -> Latents:
        """An input that an output moves; ``axis`` as :func:`~lazy_compile.runtime.fingerprint.moving_pair` gives it."""
        size = 0 if axis is None else min(inputs[position][axis], outputs[index][axis])
        return Latents(position, 0, index, 0, axis, size)

    def replayable(self) -> Replayable:
        """For :func:`lazy_compile.plan`.

        Raises:
            ConfigError: the model was exported for one schedule.
        """
        metadata = self.runner.metadata
        if metadata.gating == "schedule":
            raise ConfigError(
                f"the exported {metadata.model} holds one schedule, so that no other can be tried; export it with "
                'gating="input"'
            )
        order = len({slot.input for slot in metadata.slots}.intersection(difference_names("gap", MAX_ORDER)))
        return Replayable(
            self, self.branches, metadata.total_macs, metadata.leaders, order, self.config.warmup_steps, self._driven
        )

    @contextmanager
    def _driven(self, driver: Driver) -> Iterator[None]:
        self.reset()
        self._driver = driver
        try:
            yield
        finally:
            self._driver = None
            self.reset()

    def _run(self, inputs: Mapping[str, Tensor], placed: Placed) -> tuple[Tensor, ...]:
        if self._driver is not None:
            outputs: tuple[Tensor, ...] = self._driver(_EngineCall(self, inputs, placed))
            return outputs
        return self._follow(self._policy, inputs, placed)

    def _follow(self, policy: Policy, inputs: Mapping[str, Tensor], placed: Placed) -> tuple[Tensor, ...]:
        state, groups = placed.state, groups_of(placed)
        step, now, before = groups[0].step, groups[0].timestep, groups[0].before
        place = state.memory.get("engine")
        if not isinstance(place, _Place) or len(groups) > 1:
            place = self._continued(placed, inputs) or _Place(
                self.runner.new_stream(), np.full(len(self.branches), step)
            )
            state.memory["engine"] = place
        if (mismatch_reason := policy.mismatch_reason(step, now, before)) and mismatch_reason not in self._told:
            self._told.add(mismatch_reason)
            logger.warning("%s", mismatch_reason)
        row, force = self._decide(policy, place, state, step, now, before)
        place.stream.skip(max(step - place.last_step - 1, 0))
        slopes = policy.slopes(step, now, before)
        outputs = self.runner.run(inputs, row, force, slopes=slopes, stream=place.stream)
        place.last_step, place.logits = step, place.stream.logits
        self._note(step, place)
        return outputs

    def _continued(self, placed: Placed, inputs: Mapping[str, Tensor]) -> _Place | None:
        """Where all rows continue rows of one stream, with others left out or in another order: their caches.

        So a batch that shrinks when guidance ends goes on. Rows of several streams compute, and so do all if a branch
        takes one decision for them and cannot be taken apart.
        """
        axes, rows = self.runner.row_axes, placed.rows
        streams = [row.stream for row in rows if row.stream is not None and row.has_caches]
        places = [stream.state.memory.get("engine") for stream in streams]
        if axes is None or len(streams) < len(rows) or not isinstance(first := places[0], _Place):
            return None
        if any(place is not first for place in places) or len({row.position.step for row in rows}) > 1:
            return None
        sizes, before = self.runner.sizes_of(inputs), first.stream.sizes
        if before is None or {**sizes, BATCH: 0} != {**before, BATCH: 0}:
            return None
        place = _Place(self.runner.new_stream(), first.computed_at.copy(), first.last_step)
        place.stream.continue_rows(first.stream, [stream.row for stream in streams], axes, sizes)
        place.logits = place.stream.logits
        return place

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        names = self.runner.metadata.arguments
        if names:
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        layout, tensors = CallLayout.of(args, kwargs)
        return dict(zip(layout.names, tensors, strict=True))

    def _decide(
        self, policy: Policy, place: _Place, state: CacheState, step: int, timestep: float, before: float | None
    ) -> tuple[GateRow | None, Force]:
        if policy.reads_gates and policy.known_before_step and place.logits is not None:
            state.memory[GATES] = self.runner.decided_by(None, place.logits).tolist()
        row, decided = policy.row(timestep, before), policy.decisions(step, timestep, before, state.memory)
        if step < self.config.warmup_steps:
            return row, "compute"
        force = spread(decided, len(self.branches))
        if self.config.max_reuse_age is not None:
            self._read()
            for index in np.flatnonzero(step - place.computed_at > self.config.max_reuse_age):
                force[index] = True
        return row, force

    def _note(self, step: int, place: _Place) -> None:
        """Put the decisions of a call aside, so that nobody waits for them before they are asked for."""
        with self._counting:
            self._stats.calls += 1
            self._unread.append((step, place, place.stream.fixed, place.stream.logits))
        if len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        with self._counting:
            for step, place, fixed, logits in self._unread:
                decisions = self.runner.decided_by(fixed, logits)
                place.computed_at[decisions] = step
                rows = 1 if logits is None else len(logits)
                self._stats.record_call((step, index, np.full(rows, item)) for index, item in enumerate(decisions))
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
