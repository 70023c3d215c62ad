"""Exported models run step by step, whatever runtime holds them: caches that stay there, decisions as in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.backends.onnx.sizes import Shape, Size, Sizes, shape_at, spelled
from lazy_compile.backends.session import LoadedFile, Session
from lazy_compile.backends.stream import BufferPool, Mask, Stream, allocate
from lazy_compile.errors import ArtifactError, ConfigError, shown
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.extrapolation import SLOPE
from lazy_compile.ir.state_tensors import GATE_BIAS, GATE_WEIGHT, LOGITS, decision_name, output_of_slot
from lazy_compile.policies.gate_graph import decision
from lazy_compile.policies.gate_layout import GateLayout
from lazy_compile.policies.gate_table import FORCE, GateRow
from lazy_compile.policies.policy import Policy
from lazy_compile.runtime.tensor_snapshot import TensorSnapshot

Force = Literal["compute", "reuse"] | Sequence[bool | None]


@dataclass
class Runner:
    """An exported model, called step by step. One thread at a time for each stream.

    Attributes:
        sessions: the loaded models by the decisions that are fixed in them; a model that decides has the empty key.
        prologue: what computes their inputs that stay the same along a trajectory; None if they have none.
        streams: the caches that are alive.
        logits: ``float32[rows, G]`` of the last call; None before it, and where no gate is read.
        fixed: the decisions of the last call, if a host took them; None if the gates did.
    """

    _made_for: ClassVar[str] = "the model was exported for"
    _advice: ClassVar[str] = "export it again with an example call of the sizes that you need"

    sessions: Mapping[Mask, Session]
    prologue: LoadedFile | None = None
    streams: WeakSet[Stream] = field(default_factory=WeakSet, init=False)
    logits: Tensor | None = field(default=None, init=False)
    fixed: Mask | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._session = next(iter(self.sessions.values()))
        self.metadata = self._session.metadata
        self.device = self._session.device
        self.layout = GateLayout.of(self.branches, self.metadata.leaders)
        self.pool = BufferPool(self.device)
        for session in self.sessions.values():
            self._check_description(session)
        self._stream = self.new_stream()

    def _check_description(self, session: Session) -> None:
        """
        Raises:
            ArtifactError: a model takes or returns something else than it says of itself.
        """
        metadata = self.metadata
        described = {spec.name for spec in (*metadata.inputs, *metadata.invariants)}
        described |= {slot.input for slot in metadata.slots} | {GATE_WEIGHT, GATE_BIAS, SLOPE}
        described |= {decision_name(index) for index in self.layout.gates}
        unknown = session.inputs.keys() - described
        lacking = {name for name in metadata.outputs if name is not None} - session.outputs.keys()
        if unknown or lacking:
            raise ArtifactError(
                f"the model is not what it says of itself: {shown(sorted(unknown | lacking)[0])} is not as described; "
                "export it again"
            )

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return self.metadata.branches

    @cached_property
    def policy(self) -> Policy | None:
        """The rule that the model carries with it; None if it carries none.

        Raises:
            ArtifactError: it is of a kind that is not defined in this process.
        """
        return self.metadata.read_policy()

    @property
    def decisions(self) -> npt.NDArray[np.bool_]:
        """``bool[branches]`` of the last call, True where a branch computed; reading them waits for the device."""
        return self.decided_by(self.fixed, self.logits)

    def decided_by(self, fixed: Mask | None, logits: Tensor | None) -> npt.NDArray[np.bool_]:
        """``bool[branches]``: what all branches do that a host or the logits of their gates decided for."""
        if fixed is not None or logits is None:
            return np.array(fixed or [False] * len(self.branches))
        gates = decision(logits, self.metadata.batch_rule).cpu().numpy()
        result: npt.NDArray[np.bool_] = gates[[self.layout.gate_of(branch.index) for branch in self.branches]]
        return result

    def output_shape(self, name: str, sizes: Sizes) -> Shape:
        """Of one of the outputs, where the free sizes are these."""
        return shape_at(self._shapes.get(name, self._session.outputs[name].shape), sizes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[Size, ...]]:
        """Shapes of the outputs that are no slots, as the model describes them."""
        return {spec.name: spec.shape for spec in self.metadata.results}

    @cached_property
    def row_axes(self) -> dict[str, int] | None:
        """The axis of the rows of each slot that has one; None if rows cannot be taken apart."""
        axes: dict[str, int] = {}
        for slot in self.metadata.slots:
            if (place := output_of_slot(slot.input)) is None:
                continue
            branch, output = place
            axis = self.branches[branch].outputs[output].batch_axis
            if not self.branches[branch].row_separable or axis is None:
                return None
            axes[slot.input] = axis
        return axes

    def new_stream(self) -> Stream:
        """Caches of their own for another trajectory: the unconditional one, or another request."""
        stream = Stream(self.metadata.slots, self.pool, self.metadata.invariants)
        self.streams.add(stream)
        return stream

    def reset(self) -> None:
        """Forget all caches: the next call of every stream computes."""
        for stream in self.streams:
            stream.reset()

    def run(
        self,
        inputs: Mapping[str, Tensor | npt.NDArray[Any]],
        row: GateRow | None = None,
        force: Force | None = None,
        *,
        slopes: Sequence[float] | None = None,
        stream: Stream | None = None,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            inputs: the model's own inputs by name, of dtypes and shapes that it was exported for. Where their free
                sizes are not those of the stream's last call, a trajectory starts.
            row: the gates of this step, one for every branch of the model.
            force: what all branches do, or each of them; None leaves a branch to its gate, or without a row computes.
                Branches that share a gate do as the first of them. A stream whose caches are empty computes whatever is
                asked. Where decisions are fixed, those that no model was made for compute everything.
            slopes: how far each branch follows its line, should it be reused; None: all the way.
            stream: whose caches; None takes the runner's own.

        Returns:
            The model's own outputs that are tensors. They are the caller's: nothing writes to them again.

        Raises:
            ConfigError: an input is not of the expected form, or a host that must decide does not.
            BackendError: the runtime failed.
        """
        stream = stream or self._stream
        tensors, sizes = self._checked(inputs)
        stream.take_sizes(sizes)
        mask, gates, fixed = self._decide(row, force, stream.filled)
        session = self.sessions[mask]
        context = stream.contexts.get(mask) or stream.contexts.setdefault(mask, session.context())
        results = {
            name: allocate(self.output_shape(name, sizes), spec.dtype, self.device)
            for name, spec in session.outputs.items()
            if name not in self._next
        }
        read = {name: pair[0] for name, pair in stream.buffers.items()}
        written = [slot for output, slot in self._next.items() if output in session.outputs]
        self._renew_invariants(stream, inputs, tensors)
        given = {**tensors, **stream.invariants, **read, **gates, SLOPE: self._slope(slopes)}
        outputs = results | {f"next_{slot}": stream.buffers[slot][1] for slot in written}
        context.run({name: given[name] for name in session.inputs}, outputs)
        stream.swap(written)
        stream.logits, stream.fixed = results.pop(LOGITS, None), fixed
        self.logits, self.fixed = stream.logits, fixed
        return tuple(results[name] for name in self.metadata.outputs if name is not None)

    def _renew_invariants(
        self, stream: Stream, given: Mapping[str, Tensor | npt.NDArray[Any]], tensors: Mapping[str, Tensor]
    ) -> None:
        """Compute what stays the same along a trajectory at its first call, and where an input is another one now.

        Inputs are compared as the caller gave them: one that is the same object as before costs nothing.
        """
        if self.prologue is None:
            return
        named = {name: torch.as_tensor(given[name]) for name in self.prologue.inputs}
        seen, stream.seen = stream.seen, None  # nothing is known should it fail
        if seen is not None and all(seen[name].equals(tensor) for name, tensor in named.items()):
            stream.seen = seen
            return
        stream.prologue = stream.prologue or self.prologue.context()
        stream.prologue.run({name: tensors[name] for name in named}, stream.invariants)
        stream.seen = {name: TensorSnapshot(tensor) for name, tensor in named.items()}

    @cached_property
    def _next(self) -> dict[str, str]:
        """Slots by the output that is their next value."""
        return {slot.output: slot.input for slot in self.metadata.slots}

    def sizes_of(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """The free sizes of a call."""
        return self.metadata.sizes_of({name: tuple(tensor.shape) for name, tensor in inputs.items()})

    def _checked(self, inputs: Mapping[str, Tensor | npt.NDArray[Any]]) -> tuple[dict[str, Tensor], dict[str, int]]:
        expected = {spec.name: spec for spec in self.metadata.inputs}
        if set(inputs) != set(expected):
            raise ConfigError(f"the inputs are {', '.join(sorted(inputs))}; expected {', '.join(sorted(expected))}")
        tensors = {name: torch.as_tensor(value).detach() for name, value in inputs.items()}
        for name, tensor in tensors.items():
            spec = expected[name]
            seen = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            fits = len(spec.shape) == tensor.dim() and all(
                isinstance(size, str) or size == length for size, length in zip(spec.shape, tensor.shape, strict=True)
            )
            if not fits or str(tensor.dtype) != f"torch.{spec.dtype}":
                raise ConfigError(
                    f"input {name!r} is {seen}; {self._made_for} {spec.dtype}{spelled(spec.shape)}: "
                    f"{self._advice if not fits else f'pass {spec.dtype}'}"
                )
        sizes = self.sizes_of(tensors)
        return {name: _in_reals(tensor.to(self.device)).contiguous() for name, tensor in tensors.items()}, sizes

    def _decide(
        self, row: GateRow | None, force: Force | None, filled: bool
    ) -> tuple[Mask, dict[str, Tensor], Mask | None]:
        """Which model runs, the inputs that decide, and the decisions of all branches where a host takes them."""
        count = len(self.branches)
        if force is None or isinstance(force, str):
            force = [None if force is None else force == "compute"] * count
        if len(force) != count:
            raise ConfigError(f"force has {len(force)} entries; expected one for each of the {count} branches")
        if row is None:
            force = [item is not False for item in force]
        if not filled:
            force = [True] * count
        force = [force[leader] for leader in self.layout.leaders]
        if self.metadata.gating == "predicate":
            return (), self._row(row, force), None
        if None in force:
            raise ConfigError(
                f"this model was exported with gating={self.metadata.gating!r}: the host decides before the step; give "
                "force for every branch, or a policy that knows before: Scheduled(...) or Learned(..., delayed=True)"
            )
        mask = tuple(map(bool, force))
        if self.metadata.gating == "schedule":
            mask = mask if mask in self.sessions else (True,) * count
            return mask, {}, mask
        booleans = {decision_name(index): torch.tensor(mask[index]) for index in self.layout.gates}
        gates = self._row(row, [None] * count) if self.metadata.predictors else {}
        return (), {**booleans, **gates}, mask

    def _row(self, row: GateRow | None, force: Sequence[bool | None]) -> dict[str, Tensor]:
        """The row of a gate table, as the model takes it: of the branches that decide, and forced where asked."""
        asked = [force[index] for index in self.layout.gates]
        if row is None:
            own = GateRow(torch.zeros(self.layout.width), torch.zeros(len(asked)))
        else:
            own = self.layout.row(row)
        forced = torch.tensor([item is not None for item in asked])
        bias = torch.where(forced, torch.tensor([FORCE if item else -FORCE for item in asked]), own.bias)
        weight = own.weight.masked_fill(forced.repeat_interleave(self._widths), 0.0)
        return {GATE_WEIGHT: weight.to(self.device), GATE_BIAS: bias.to(self.device)}

    def _slope(self, slopes: Sequence[float] | None) -> Tensor:
        chosen = [1.0 if slopes is None else slopes[index] for index in self.layout.gates]
        return torch.tensor(chosen, device=self.device)

    @cached_property
    def _widths(self) -> Tensor:
        """``int64[G]``: features of each gate."""
        return torch.tensor([self.layout.features[index] for index in self.layout.gates])


def _in_reals(tensor: Tensor) -> Tensor:
    """Complex numbers as an exported model takes them: a last axis of real and imaginary part."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
