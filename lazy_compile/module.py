"""The transformed model: the original's signature around a gated graph."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.branch import Refusal, ResidualBranch
from lazy_compile.capture import CallLayout, Capture, capture
from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError, NoBranchError
from lazy_compile.lazy_branch import LazyStep
from lazy_compile.operators import macs
from lazy_compile.pass_manager import PassManager
from lazy_compile.policy import AlwaysCompute, Policy
from lazy_compile.program import Program, Role
from lazy_compile.runtime import LazyStats, PolicyStep
from lazy_compile.timestep import Trajectories, find_timestep_input, use_stream

logger = logging.getLogger("lazy_compile")


@dataclass(frozen=True)
class LazyGraph:
    """One capture of the model, compiled: what calls of one layout, dtype, device and family of shapes run on."""

    layout: CallLayout
    captured: Capture
    program: Program
    timestep_position: int | None
    types: tuple[Any, ...]
    total_macs: int

    def serves(self, layout: CallLayout, tensors: Sequence[Tensor], types: tuple[Any, ...]) -> bool:
        return types == self.types and layout == self.layout and self.captured.accepts(tensors)

    def timestep(self, tensors: Sequence[Tensor]) -> float | None:
        """The time input of a call; the noisiest row's, should they differ."""
        if self.timestep_position is None:
            return None
        return float(tensors[self.timestep_position].detach().max())

    def run(self, state: Sequence[Tensor], tensors: Sequence[Tensor], step: LazyStep) -> Any:
        outputs = self.program.graph_module(*state, *tensors, step)
        return pytree.tree_unflatten(list(outputs), self.captured.output_spec)


class LazyModule(nn.Module):
    """A model whose branches compute or reuse, called exactly like the original.

    Parameters are shared with the original, which is never modified; attributes that this class does not have are the
    original's. Graphs are captured when first needed: another dtype, device or structure of the arguments captures
    again, and so do sizes that the model does not keep dynamic.

    Attributes:
        original: the model as it was given.
        config: see :class:`~lazy_compile.config.LazyConfig`.
    """

    def __init__(self, original: nn.Module, config: LazyConfig, pipeline: PassManager) -> None:
        super().__init__()
        self.original = original
        self.config = config
        self.training = original.training
        self._pipeline = pipeline
        self._policy: Policy = AlwaysCompute()
        self._graphs: list[LazyGraph] = []
        self._trajectories = Trajectories()
        self._stats: LazyStats | None = None
        self._environment: tuple[Any, ...] = ()
        self._signature = inspect.signature(original.forward)

    # What the model does ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, under the current policy; arguments and result are those of the original."""
        graph, tensors = self._graph_for(args, kwargs)
        trajectory = self._trajectories.current()
        timestep = graph.timestep(tensors)
        state, index, started = trajectory.advance(timestep)
        if started and self._environment != self._observe_environment():
            self._graphs.clear()
            graph, tensors = self._graph_for(args, kwargs)
        self.stats.calls += 1
        step = PolicyStep(
            self._policy, self.config, state, self.stats, index, float(index) if timestep is None else timestep
        )
        return graph.run(self._state_of(graph), tensors, step)

    def evaluate(self, step: LazyStep, *args: Any, **kwargs: Any) -> Any:
        """One call in which ``step`` decides what every branch does, outside any trajectory."""
        graph, tensors = self._graph_for(args, kwargs)
        return graph.run(self._state_of(graph), tensors, step)

    def capture(self, *args: Any, **kwargs: Any) -> LazyGraph:
        """Capture now, for calls like this one, without running the model.

        Raises:
            CaptureError: the model cannot be turned into a graph.
            NoBranchError: there is nothing to gate in it.
        """
        return self._graph_for(args, kwargs)[0]

    # What can be asked --------------------------------------------------------------------------------------------

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        """The gated branches in execution order."""
        return self.graph.program.branches

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What was looked at and not gated, and why."""
        return self.graph.program.refusals

    @property
    def graph(self) -> LazyGraph:
        """The latest graph.

        Raises:
            ConfigError: nothing was captured yet.
        """
        if not self._graphs:
            raise ConfigError("this model was not captured yet; call it once, or pass example_inputs to transform()")
        return self._graphs[-1]

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise ConfigError(
                f"policy is {policy!r}; expected AlwaysCompute(), Scheduled(schedule), Learned(table) or another Policy"
            )
        if self._graphs:
            policy.check(self.branches)
        self._policy = policy
        self.reset()

    @property
    def stats(self) -> LazyStats:
        """What was reused since the last :meth:`reset_stats`."""
        if self._stats is None:
            self.reset_stats()
        assert self._stats is not None
        return self._stats

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches of this thread hold now."""
        return self._trajectories.bytes

    @property
    def expected_cache_bytes(self) -> int:
        """Memory that the caches of one stream will hold, at the captured sizes."""
        tensors_kept = 2 if self.config.reuse == "linear" else 1
        return tensors_kept * sum(branch.output_bytes for branch in self.branches)

    # What can be changed ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all caches of this thread: the next call starts a trajectory."""
        self._trajectories.reset()

    def reset_stats(self) -> None:
        graph = self.graph
        branch_macs = np.array([branch.macs for branch in graph.program.branches], dtype=np.float64)
        self._stats = LazyStats(branch_macs, graph.total_macs, captures=len(self._graphs))

    def stream(self, name: str) -> AbstractContextManager[None]:
        """Calls inside this context belong to a trajectory of their own, named ``name``."""
        return use_stream(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyModule:
        import copy

        twin = LazyModule(copy.deepcopy(self.original, memo), self.config, self._pipeline)
        twin._policy = self._policy
        return twin

    # How ----------------------------------------------------------------------------------------------------------

    def _graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LazyGraph, list[Tensor]]:
        layout, tensors = CallLayout.of(*self._bind(args, kwargs))
        types = _types_of(tensors)
        for position, graph in enumerate(reversed(self._graphs)):
            if graph.serves(layout, tensors, types):
                if position:
                    self._graphs.remove(graph)
                    self._graphs.append(graph)
                return graph, tensors
        return self._compile(layout, tensors, types), tensors

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with every argument by name, so that its spelling does not matter."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"{type(self.original).__name__}.forward: {error}; its signature is {self._signature}"
            ) from error
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
            return args, kwargs
        arguments = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        return (), arguments

    def _compile(self, layout: CallLayout, tensors: Sequence[Tensor], types: tuple[Any, ...]) -> LazyGraph:
        captured = capture(self.original, layout, tensors)
        if self._graphs:
            logger.info("captured another graph, for inputs %s", [tuple(tensor.shape) for tensor in tensors])
        timestep = find_timestep_input(captured.program, self.config.timestep_input)
        if timestep is None:
            logger.warning(
                "no timestep input was found in %s: every call counts as the next step; "
                "name it with LazyConfig(timestep_input=...), or call reset() before each trajectory",
                type(self.original).__name__,
            )
        total = sum(macs(node) for node in captured.program.graph.nodes)
        program = self._pipeline.run(captured.program)
        if not program.branches:
            reasons = "; ".join(f"{refusal.path or refusal.node}: {refusal.reason}" for refusal in program.refusals[:3])
            raise NoBranchError(
                f"{type(self.original).__name__} has no residual branch that could be gated "
                f"({reasons or 'no addition joins a skip connection with heavy operators'})"
            )
        self._policy.check(program.branches)
        graph = LazyGraph(layout, captured, program, timestep, types, total)
        self._graphs = [*self._graphs, graph][-self.config.max_captures :]
        self._environment = self._observe_environment()
        if self._stats is None or len(self._stats.branch_macs) != len(program.branches):
            self.reset_stats()
        return graph

    def _state_of(self, graph: LazyGraph) -> list[Tensor]:
        """Current parameters, buffers and constants in graph order: a weight that was changed takes effect."""
        values = []
        for item in graph.program.inputs:
            if item.role in (Role.PARAMETER, Role.BUFFER):
                owner, _, leaf = item.name.rpartition(".")
                values.append(getattr(self.original.get_submodule(owner), leaf))
            elif item.role is Role.CONSTANT:
                values.append(graph.program.constants[item.name])
        return values

    def _observe_environment(self) -> tuple[Any, ...]:
        """What a graph silently depends on: the modules that the model is made of, and the types of its parameters."""
        modules = tuple(map(id, self.original.modules()))
        return modules, tuple((parameter.dtype, parameter.device) for parameter in self.original.parameters())


def _types_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    devices = {tensor.device.type for tensor in tensors}
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in sorted(devices) if torch.is_autocast_enabled(device)
    )
    return tuple((tensor.dtype, tensor.device) for tensor in tensors) + autocast
