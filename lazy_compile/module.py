"""The transformed model: the original's signature around a gated graph."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
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
from lazy_compile.runtime import CacheState, LazyStats, PolicyStep
from lazy_compile.timestep import Trajectories, find_timestep_input, use_stream

logger = logging.getLogger("lazy_compile")

_CAPTURING = threading.RLock()
"""torch.export changes global state: one capture at a time, and none while another thread looks for its graph."""


@dataclass(frozen=True, eq=False)
class LazyGraph:
    """One capture of the model, compiled: what calls of one layout, dtype, device and family of shapes run on.

    Attributes:
        timestep_position: which of the tensor inputs is the time input; None if none is.
        types: dtypes and devices of the tensor inputs, and autocast.
        sources: where each parameter, buffer and constant is looked up at every call, in graph order.
    """

    layout: CallLayout
    captured: Capture
    program: Program
    timestep_position: int | None
    types: tuple[Any, ...]
    total_macs: int
    sources: tuple[tuple[Mapping[str, Tensor | None], str], ...]

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


@dataclass(frozen=True)
class ModelCall:
    """One call of a lazy model, placed in its trajectory and not yet answered.

    Attributes:
        caches: the slots of this call's stream.
        step: index of the sampler step in its trajectory.
        timestep: the time input, or the step index where the model has none.
    """

    graph: LazyGraph
    state: Sequence[Tensor]
    tensors: Sequence[Tensor]
    caches: CacheState
    step: int
    timestep: float

    def run(self, step: LazyStep) -> Any:
        """The model's own return value, with every branch doing as ``step`` decides."""
        return self.graph.run(self.state, self.tensors, step)

    def for_training(self) -> ModelCall:
        """The same call with tensors that autograd may keep, should a sampler run under inference mode."""
        tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in self.tensors]
        return replace(self, tensors=tensors)

    def run_flat(self, step: LazyStep) -> list[Tensor]:
        """The tensors of the return value."""
        return [leaf for leaf in pytree.tree_leaves(self.run(step)) if isinstance(leaf, Tensor)]


class LazyModule(nn.Module):
    """A model whose branches compute or reuse, called exactly like the original.

    Parameters are shared with the original, which is never modified; attributes that this class does not have are the
    original's. Graphs are captured when first needed: another dtype, device or structure of the arguments captures
    again, and so do sizes that the model does not keep dynamic.

    Attributes:
        original: the model as it was given.
        lazy_config: see :class:`~lazy_compile.config.LazyConfig`; ``config`` is the original's, which pipelines read.
    """

    def __init__(self, original: nn.Module, config: LazyConfig, pipeline: PassManager) -> None:
        super().__init__()
        self.original = original
        self.lazy_config = config
        self.training = original.training
        self._pipeline = pipeline
        self._policy: Policy = AlwaysCompute()
        self._drive: Callable[[ModelCall], Any] = self._follow_policy
        self._graphs: list[LazyGraph] = []
        self._trajectories = Trajectories()
        self._stats: dict[tuple[str, ...], LazyStats] = {}
        self._environment: tuple[Any, ...] = ()
        self._signature = inspect.signature(original.forward)

    # What the model does ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, under the current policy; arguments and result are those of the original."""
        graph, tensors = self._graph_for(args, kwargs)
        timestep = graph.timestep(tensors)
        state, index, started = self._trajectories.current().advance(timestep)
        if started and self._environment != self._observe_environment():
            self._graphs.clear()
            graph, tensors = self._graph_for(args, kwargs)
        now = float(index) if timestep is None else timestep
        return self._drive(ModelCall(graph, self._state_of(graph), tensors, state, index, now))

    def _follow_policy(self, call: ModelCall) -> Any:
        stats = self._stats_of(call.graph)
        stats.calls += 1
        return call.run(PolicyStep(self._policy, self.lazy_config, call.caches, stats, call.step, call.timestep))

    @contextmanager
    def driven_by(self, driver: Callable[[ModelCall], Any]) -> Iterator[None]:
        """Within this context ``driver`` answers every call, so that a sampler can be observed or steered."""
        self.reset()
        self._drive = driver
        try:
            yield
        finally:
            self._drive = self._follow_policy
            self.reset()

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
        self.reset_stats()

    @property
    def stats(self) -> LazyStats:
        """What was reused since the last :meth:`reset_stats`, by graphs with the same branches as the latest."""
        return self._stats_of(self.graph)

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches of this thread hold now."""
        return self._trajectories.bytes

    @property
    def expected_cache_bytes(self) -> int:
        """Memory that the caches of one stream will hold, at the captured sizes."""
        tensors_kept = 2 if self.lazy_config.reuse == "linear" else 1
        return tensors_kept * sum(branch.output_bytes for branch in self.branches)

    # What can be changed ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all caches of this thread: the next call starts a trajectory."""
        self._trajectories.reset()

    def reset_stats(self) -> None:
        self._stats.clear()

    def stream(self, name: str) -> AbstractContextManager[None]:
        """Calls inside this context belong to a trajectory of their own, named ``name``."""
        return use_stream(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As part of another module: the names of the state are those of the original, see :meth:`state_dict`."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}original.{name.removeprefix(prefix)}"] = state_dict.pop(name)

    def save(self, directory: str | Path) -> None:
        """Write the options, the policy and its gates to a folder, without the weights; ``lazy_compile.load`` reads it.

        Raises:
            ConfigError: nothing was captured yet.
            ArtifactError: the folder cannot be written to.
        """
        from lazy_compile.artifact import save

        save(self, directory)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyModule:
        import copy

        twin = LazyModule(copy.deepcopy(self.original, memo), self.lazy_config, self._pipeline)
        twin._policy = self._policy
        return twin

    # How ----------------------------------------------------------------------------------------------------------

    def _graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LazyGraph, list[Tensor]]:
        layout, tensors = CallLayout.of(*self._bind(args, kwargs))
        types = _types_of(tensors)
        with _CAPTURING:
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
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(sorted(arguments.pop(name).items()))
        return (), arguments

    def _compile(self, layout: CallLayout, tensors: Sequence[Tensor], types: tuple[Any, ...]) -> LazyGraph:
        captured = capture(self.original, layout, tensors)
        environment = self._observe_environment()
        if environment != self._environment:
            self._graphs, self._environment = [], environment
        if self._graphs:
            logger.info("captured another graph, for inputs %s", [tuple(tensor.shape) for tensor in tensors])
        if any(graph.layout.differs_in_numbers(layout) for graph in self._graphs):
            logger.warning(
                "%s was captured again for another value of a Python number: such a value is part of the graph; "
                "pass what changes from step to step as a tensor",
                type(self.original).__name__,
            )
        timestep = find_timestep_input(captured.program, self.lazy_config.timestep_input)
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
        graph = LazyGraph(layout, captured, program, timestep, types, total, tuple(self._sources(program)))
        self._graphs = [*self._graphs, graph][-self.lazy_config.max_captures :]
        return graph

    def _stats_of(self, graph: LazyGraph) -> LazyStats:
        names = tuple(branch.name for branch in graph.program.branches)
        if names not in self._stats:
            branch_macs = np.array([branch.macs for branch in graph.program.branches], dtype=np.float64)
            self._stats[names] = LazyStats(branch_macs, graph.total_macs)
        self._stats[names].captures = len(self._graphs)
        return self._stats[names]

    def _state_of(self, graph: LazyGraph) -> list[Any]:
        """Current parameters, buffers and constants in graph order: a weight that was changed takes effect."""
        return [values[name] for values, name in graph.sources]

    def _sources(self, program: Program) -> Iterator[tuple[Mapping[str, Tensor | None], str]]:
        for item in program.inputs:
            owner, _, leaf = item.name.rpartition(".")
            if item.role is Role.PARAMETER:
                yield self.original.get_submodule(owner)._parameters, leaf
            elif item.role is Role.BUFFER:
                yield self.original.get_submodule(owner)._buffers, leaf
            elif item.role is Role.CONSTANT:
                yield program.constants, item.name

    def _observe_environment(self) -> tuple[Any, ...]:
        """What a graph silently depends on: modules, their plain attributes and hooks, and the types of parameters."""
        modules = tuple((id(module), *_attributes(module)) for module in self.original.modules())
        return modules, tuple((parameter.dtype, parameter.device) for parameter in self.original.parameters())


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A capture is always made in evaluation mode, and parameters are looked up at every call: both may change."""
    for name, value in vars(module).items():
        if name not in ("training", "_parameters", "_buffers", "_modules"):
            yield name, _snapshot(value)


def _snapshot(value: Any) -> Any:
    """Numbers, texts and what is made of them by value, everything else by identity."""
    if isinstance(value, tuple | list):
        return tuple(map(_snapshot, value))
    if isinstance(value, dict):
        return tuple((key, _snapshot(item)) for key, item in value.items())
    return value if isinstance(value, bool | int | float | str) else id(value)


def _types_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    devices = {tensor.device.type for tensor in tensors}
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in sorted(devices) if torch.is_autocast_enabled(device)
    )
    return tuple((tensor.dtype, tensor.device) for tensor in tensors) + autocast
