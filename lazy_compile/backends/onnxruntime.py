"""Running an exported model in ONNX Runtime: caches that never leave it, and decisions as in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.backends.onnx_metadata import OnnxMetadata, SlotSpec, first_line
from lazy_compile.branch import ResidualBranch
from lazy_compile.call_layout import CallLayout
from lazy_compile.config import LazyConfig
from lazy_compile.errors import ArtifactError, BackendError, ConfigError, import_optional
from lazy_compile.gate import FORCE, GateRow
from lazy_compile.ops import decision
from lazy_compile.policy import AlwaysCompute, Learned, Policy, Scheduled
from lazy_compile.runtime import LazyStats
from lazy_compile.timestep import Trajectories

Force = Literal["compute", "reuse"] | Sequence[bool | None]


class OnnxStream:
    """The caches of one trajectory: two sets of buffers, of which each call reads one and writes the other."""

    def __init__(self, slots: Sequence[SlotSpec], device: torch.device) -> None:
        ort = import_optional("onnxruntime", "onnx")
        self.slots = slots
        self.filled = False
        with torch.inference_mode(False):
            self.buffers = [
                [torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device=device) for slot in slots]
                for _ in range(2)
            ]
        self._values = [list(map(ort.OrtValue.from_dlpack, tensors)) for tensors in self.buffers]
        self.reset()

    def reset(self) -> None:
        """Back to what a trajectory starts from."""
        self.filled = False
        for slot, tensor in zip(self.slots, self.buffers[0], strict=True):
            tensor.fill_(slot.initial)

    def bind(self, binding: Any) -> None:
        for slot, source, target in zip(self.slots, *self._values, strict=True):
            binding.bind_ortvalue_input(slot.input, source)
            binding.bind_ortvalue_output(slot.output, target)

    def swap(self) -> None:
        self.filled = True
        self.buffers.reverse()
        self._values.reverse()

    def skip(self, steps: int) -> None:
        """Steps of the trajectory passed in which this stream was not called."""
        for slot, tensor in zip(self.slots, self.buffers[0], strict=True):
            if steps and slot.input == "age":
                tensor.add_(steps)

    @property
    def bytes(self) -> int:
        return 2 * sum(tensor.numel() * tensor.element_size() for tensor in self.buffers[0])


class OnnxRunner:
    """An exported model, called step by step. One thread at a time.

    Attributes:
        metadata: what the file says about itself.
        streams: the caches that are alive.
        logits: ``float32[rows, G]`` of the last call; None before it.
        decisions: ``bool[G]`` of the last call, True where a branch computed.

    Raises:
        ArtifactError: there is no such file, it is damaged, or export_onnx did not write it.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int | None = None
    ) -> None:
        ort = import_optional("onnxruntime", "onnx")
        if not Path(path).is_file():
            raise ArtifactError(f"there is no file {path}; export_onnx writes one")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self.session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:
            if type(error).__name__ == "NotImplemented":
                raise BackendError(f"ONNX Runtime has no kernel for {path}: {first_line(error)}") from error
            raise ArtifactError(f"cannot load {path} ({first_line(error)}); export the model again") from error
        self.metadata = OnnxMetadata.parse(self.session.get_modelmeta().custom_metadata_map)
        on_cpu = self.session.get_providers()[0] == "CPUExecutionProvider"
        self.device = torch.device("cpu" if on_cpu else "cuda")
        self.streams: WeakSet[OnnxStream] = WeakSet()
        self.logits: Tensor | None = None
        self.decisions: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._features = torch.tensor([branch.gate_features for branch in self.branches])
        self._outputs = {output.name: output for output in self.session.get_outputs()}
        self._stream = self.new_stream()

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return self.metadata.branches

    def new_stream(self) -> OnnxStream:
        """Caches of their own for another trajectory: the unconditional one, or another request."""
        stream = OnnxStream(self.metadata.slots, self.device)
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
        stream: OnnxStream | None = None,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            inputs: the model's own inputs by name, of the shapes and dtypes that it was exported for.
            row: the gates of this step. Without it every branch that is not forced computes.
            force: what all branches do, or each of them; None leaves a branch to its gate. A stream whose caches are
                empty computes whatever is asked. Entries that are not finite compute.
            stream: whose caches; None takes the runner's own.

        Returns:
            The model's own outputs that are tensors. They are the caller's: nothing writes to them again.
        """
        ort = import_optional("onnxruntime", "onnx")
        stream = stream or self._stream
        binding = self.session.io_binding()
        feeds = {**self._checked(inputs), **self._gates(row, force, stream.filled)}
        for name, tensor in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.from_dlpack(tensor))
        results = {name: self._empty(name) for name in self._own_outputs}
        for name, tensor in results.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.from_dlpack(tensor))
        stream.bind(binding)
        binding.synchronize_inputs()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
        binding.synchronize_outputs()
        stream.swap()
        self.logits = results.pop("compute_logits")
        self.decisions = decision(self.logits, self.metadata.batch_rule).cpu().numpy()
        return tuple(results.values())

    @property
    def _own_outputs(self) -> list[str]:
        return [*(name for name in self.metadata.outputs if name is not None), "compute_logits"]

    def _empty(self, name: str) -> Tensor:
        output = self._outputs[name]
        return torch.empty(output.shape, dtype=_DTYPES[output.type], device=self.device)

    def _checked(self, inputs: Mapping[str, Tensor | npt.NDArray[Any]]) -> dict[str, Tensor]:
        expected = {spec.name: spec for spec in self.metadata.inputs}
        if set(inputs) != set(expected):
            raise ConfigError(f"the inputs are {', '.join(sorted(inputs))}; expected {', '.join(sorted(expected))}")
        tensors = {name: torch.as_tensor(value).detach() for name, value in inputs.items()}
        for name, tensor in tensors.items():
            seen = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            wanted = f"{expected[name].dtype}{list(expected[name].shape)}"
            if seen != wanted:
                raise ConfigError(
                    f"input {name!r} is {seen}; the model was exported for {wanted}: "
                    "export it again with an example call of the sizes that you need"
                )
        return {name: tensor.to(self.device).contiguous() for name, tensor in tensors.items()}

    def _gates(self, row: GateRow | None, force: Force | None, filled: bool) -> dict[str, Tensor]:
        count = len(self.branches)
        if force is None or isinstance(force, str):
            force = [None if force is None else force == "compute"] * count
        if len(force) != count:
            raise ConfigError(f"force has {len(force)} entries; expected one for each of the {count} branches")
        if row is None:
            row = GateRow(torch.zeros(int(self._features.sum())), torch.zeros(count))
            force = [item is not False for item in force]
        if not filled:
            force = [True] * count
        forced = torch.tensor([item is not None for item in force])
        bias = torch.tensor([FORCE if item else -FORCE for item in force])
        gates = {
            "gate_weight": row.weight.cpu().float().masked_fill(forced.repeat_interleave(self._features), 0.0),
            "gate_bias": torch.where(forced, bias, row.bias.cpu().float()),
        }
        return {name: tensor.to(self.device) for name, tensor in gates.items()}


@dataclass
class _Place:
    """Where one stream of a trajectory stands; ``computed_at: int64[G]`` is the step at which each branch computed."""

    stream: OnnxStream
    computed_at: npt.NDArray[np.int64]
    last_step: int = -1


class OnnxDenoiser:
    """An exported model called like the original, under a policy, so that a sampler cannot tell the difference.

    Trajectories and parallel streams are told apart by the timestep input, as in
    :class:`~lazy_compile.module.LazyModule`, and the decisions are the same as there with the ``batch_rule`` that the
    model was exported with. Arguments that are not tensors were fixed by the export and are ignored.

    Args:
        runner: the exported model.
        policy: ``AlwaysCompute()``, ``Scheduled(schedule)`` or ``Learned(table)``.
        config: ``warmup_steps`` and ``max_reuse_age`` are taken from it; the rest was fixed by the export.

    Raises:
        ConfigError: the policy was made for another model, or asks the activations in Python.
    """

    def __init__(self, runner: OnnxRunner, policy: Policy | None = None, config: LazyConfig | None = None) -> None:
        self.runner = runner
        self.config = config or LazyConfig()
        self._trajectories = Trajectories()
        self.policy = policy or AlwaysCompute()
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
        self._policy = policy
        self.reset()

    def reset(self) -> None:
        """Forget all caches: the next call starts a trajectory."""
        self._trajectories.reset()

    def reset_stats(self) -> None:
        macs = np.array([branch.macs for branch in self.branches], dtype=np.float64)
        self.stats = LazyStats(macs, self.runner.metadata.total_macs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step; arguments and result are those of the original, or a plain tuple if its result type is
        not known here."""
        inputs = self._inputs(args, kwargs)
        name = self.runner.metadata.timestep_input
        timestep = None if name is None else float(inputs[name].max())
        state, step, _ = self._trajectories.current().advance(timestep)
        place = state.memory.get("onnx")
        if not isinstance(place, _Place):
            place = _Place(self.runner.new_stream(), np.full(len(self.branches), step))
            state.memory["onnx"] = place
        row, force = self._decide(place, step, float(step) if timestep is None else timestep)
        place.stream.skip(max(step - place.last_step - 1, 0))
        outputs = self.runner.run(inputs, row, force, stream=place.stream)
        place.last_step = step
        place.computed_at[self.runner.decisions] = step
        self._record(step)
        return self._result(outputs)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        names = self.runner.metadata.arguments
        if names:
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        layout, tensors = CallLayout.of(args, kwargs)
        return dict(zip(layout.names, tensors, strict=True))

    def _decide(self, place: _Place, step: int, timestep: float) -> tuple[GateRow | None, Force]:
        policy, row = self._policy, None
        force: list[bool | None]
        if step < self.config.warmup_steps or isinstance(policy, AlwaysCompute):
            return None, "compute"
        if isinstance(policy, Learned):
            row = policy.table.row(timestep)
            row = GateRow(row.weight, row.bias + policy.shift)
            force = [None] * len(self.branches)
        else:
            assert isinstance(policy, Scheduled)
            table = policy.schedule.should_compute
            force = table[step].tolist() if step < len(table) else [True] * len(self.branches)
        if self.config.max_reuse_age is not None:
            for index in np.flatnonzero(step - place.computed_at > self.config.max_reuse_age):
                force[index] = True
        return row, force

    def _record(self, step: int) -> None:
        assert self.runner.logits is not None
        self.stats.calls += 1
        for index, computes in enumerate(self.runner.decisions):
            self.stats.record(step, index, np.full(len(self.runner.logits), computes))

    def _result(self, outputs: Sequence[Tensor]) -> Any:
        remaining = iter(outputs)
        leaves = [None if name is None else next(remaining) for name in self.runner.metadata.outputs]
        return tuple(leaves) if self._spec is None else pytree.tree_unflatten(leaves, self._spec)

    @cached_property
    def _spec(self) -> pytree.TreeSpec | None:
        try:
            return pytree.treespec_loads(self.runner.metadata.output_spec)
        except (ValueError, NotImplementedError):
            return None


_DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}  # fmt: skip
