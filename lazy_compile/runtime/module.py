"""The transformed model: the original's signature around a gated graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazy_compile.capture.lock import CAPTURE_LOCK
from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import Refusal, ResidualBranch
from lazy_compile.ir.lazy_branch import LazyStep, lazy_calls
from lazy_compile.policies.policy import AlwaysCompute, Policy
from lazy_compile.policies.presets import PolicyLike, as_policy
from lazy_compile.runtime.artifact import Artifact, describe, fingerprint, write
from lazy_compile.runtime.graph_cache import GraphCache
from lazy_compile.runtime.lazy_graph import LazyGraph as LazyGraph
from lazy_compile.runtime.model_call import ModelCall as ModelCall
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.runtime.stats import LazyStats
from lazy_compile.runtime.step_invariants import follow
from lazy_compile.runtime.trajectory import Trajectories, use_stream

logger = logging.getLogger("lazy_compile")


class LazyModule(nn.Module):
    """A model whose branches compute or reuse, called exactly like the original.

    Parameters are shared with the original, which is never modified; attributes that this class does not have are the
    original's. Graphs are captured when first needed: another dtype, device or structure of the arguments captures
    again, and so do sizes that the model does not keep dynamic.

    Attributes:
        original: the model as it was given.
        lazy_config: see :class:`~lazy_compile.config.LazyConfig`; ``config`` is the original's, which pipelines read.
    """

    def __init__(self, original: nn.Module, config: LazyConfig) -> None:
        super().__init__()
        self.original = original
        self.lazy_config = config
        self.training = original.training
        self._graphs = GraphCache(original, self._admit)
        self._policy: Policy = AlwaysCompute()
        self._planned: dict[str, ResidualBranch] = {}
        self._handler: Callable[[ModelCall], Any] = self._follow_policy
        self._trajectories = Trajectories()
        self._stats: dict[tuple[str, ...], LazyStats] = {}
        self._compile: Callable[[LazyGraph], None] | None = None
        self._run = torch.compiler.disable(self._call)  # torch.compile(lazy) leaves it as it is

    # What the model does ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, under the current policy; arguments and result are those of the original."""
        return self._run(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        graph, tensors = self._graph_for(args, kwargs)
        timestep = graph.timestep(tensors)
        stream, index, started = self._trajectories.advance(timestep)
        if started and self._graphs.drop_if_model_changed():
            graph, tensors = self._graph_for(args, kwargs)
        now = float(index) if timestep is None else timestep
        weights: list[Any] = graph.state()
        with CAPTURE_LOCK.running():
            invariants: Sequence[Tensor] = ()
            if self.lazy_config.hoist_step_invariants:
                stream.invariants, graph, invariants = follow(
                    stream.invariants, graph, weights, tensors, self._graphs.hoisted
                )
            return self._handler(ModelCall(graph, weights, tensors, stream.caches, index, now, invariants))

    def _follow_policy(self, call: ModelCall) -> Any:
        stats = self._stats_of(call.graph)
        stats.calls += 1
        if change := call.caches.follow_rows(call.row_inputs, call.graph.branches):
            self._graphs.warn_once(f"the batch of {type(self.original).__name__} changed midway {change}")
        if mismatch_reason := self._policy.mismatch_reason(call.step, call.timestep, call.caches.timestep_before):
            self._graphs.warn_once(f"{type(self.original).__name__}: {mismatch_reason}")
        leaders = call.graph.leaders(self.lazy_config.group)
        return call.run(
            PolicyStep(
                self._policy,
                self.lazy_config,
                call.caches,
                stats,
                call.step,
                call.timestep,
                self._planned if self._policy.per_branch else None,
                leaders,
            )
        )

    @contextmanager
    def call_handler(self, driver: Callable[[ModelCall], Any]) -> Iterator[None]:
        """Within this context ``driver`` answers every call, so that a sampler can be observed or steered."""
        self.reset()
        self._handler = driver
        try:
            yield
        finally:
            self._handler = self._follow_policy
            self.reset()

    def evaluate(self, step: LazyStep, *args: Any, **kwargs: Any) -> Any:
        """One call in which ``step`` decides what every branch does, outside any trajectory."""
        graph, tensors = self._graph_for(args, kwargs)
        with CAPTURE_LOCK.running():
            return graph.run(graph.state(), tensors, step)

    def capture(self, *args: Any, **kwargs: Any) -> LazyGraph:
        """Capture now, for calls like this one, without running the model.

        Raises:
            CaptureError: the model cannot be turned into a graph.
            NoBranchError: there is nothing to gate in it.
        """
        return self._graph_for(args, kwargs)[0]

    def release(self) -> nn.Module:
        """The original, to go on without this lazy model."""
        return self.original

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
    def is_captured(self) -> bool:
        return bool(self._graphs.graphs)

    @property
    def graph(self) -> LazyGraph:
        """The latest graph.

        Raises:
            ConfigError: nothing was captured yet.
        """
        if not self._graphs.graphs:
            raise ConfigError("this model was not captured yet; call it once, or pass example_inputs to transform()")
        return self._graphs.graphs[-1]

    @property
    def policy(self) -> Policy:
        """The rule that decides; a :class:`CacheSchedule` and the name of a preset may be set too, at any time."""
        return self._policy

    @policy.setter
    def policy(self, given: PolicyLike) -> None:
        policy = as_policy(given)
        if self._graphs.graphs:
            self._planned = {branch.name: branch for branch in self._branches_for(policy)}
        self._policy = policy
        logger.info("%s: %s", type(self.original).__name__, policy.describe())
        self._warn_of_unknown_branches(self._graphs.graphs)
        self.reset(every_thread=True)
        self.reset_stats()

    @property
    def stats(self) -> LazyStats:
        """What was reused since the last :meth:`reset_stats`, by graphs with the same branches as the latest."""
        return self._stats_of(self.graph)

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches of all threads hold now, results that stay the same along a trajectory included."""
        return self._trajectories.bytes

    @property
    def expected_cache_bytes(self) -> int:
        """Memory that what branches may reuse will take in one stream, at the captured sizes."""
        tensors_kept = 2 if self.lazy_config.reuse == "linear" else 1
        return tensors_kept * sum(branch.output_bytes for branch in self.branches)

    # What can be changed ------------------------------------------------------------------------------------------

    def reset(self, stream: str | None = None, *, every_thread: bool = False) -> None:
        """Forget caches: the next call starts a trajectory.

        Args:
            stream: the name of a stream that has ended, see :meth:`stream`; None for all of them.
            every_thread: not those of this thread alone.
        """
        self._trajectories.reset(stream, every_thread=every_thread)

    def reset_stats(self) -> None:
        self._stats.clear()

    def stream(self, name: str) -> AbstractContextManager[None]:
        """Calls inside this context belong to a trajectory of their own, named ``name``.

        Its caches stay until it is reset, its thread ends, or many other names have been used since.
        """
        return use_stream(name)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the branches, each by itself, with the options of ``torch.compile``.

        What decides between them, and what lies between them, stays as it is. ``torch.compile(lazy)`` compiles nothing.
        """

        def compile_branches(graph: LazyGraph) -> None:
            for _, branch in lazy_calls(graph.program):
                branch.compile(*args, **kwargs)
            for each in graph.hoisted.values():
                if each is not graph:
                    compile_branches(each)

        self._compile = compile_branches
        for graph in self._graphs.graphs:
            compile_branches(graph)

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
        captured = self.graph.captured
        write(
            directory,
            Artifact(
                config=self.lazy_config,
                policy=self.policy,
                fingerprint=fingerprint(self.original),
                capture=captured.rung,
                attempts=tuple(captured.attempts),
                guarded_inputs=tuple(self.graph.guarded_inputs),
                branches=describe(self.branches),
            ),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, captures for itself; it has the options and the policy, and no caches."""
        return _rebuild, (type(self), self.original, self.lazy_config, self._policy)

    # How ----------------------------------------------------------------------------------------------------------

    def _graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LazyGraph, list[Tensor]]:
        return self._graphs.find(args, kwargs, self.lazy_config)

    def _state_of(self, graph: LazyGraph) -> list[Any]:
        return graph.state()

    def _admit(self, graph: LazyGraph) -> None:
        """Hold the policy against the first graph; in others, branches are matched to that one's by their names."""
        if not self._planned:
            self._policy.check(graph.branches)
            self._planned = {branch.name: branch for branch in graph.branches}
        if self._compile is not None:
            self._compile(graph)
        self._warn_of_unknown_branches([graph])

    def _branches_for(self, policy: Policy) -> tuple[ResidualBranch, ...]:
        """Those of the latest graph that a policy fits: the graph of a call that skips layers has fewer.

        Raises:
            ConfigError: it fits none; what the latest graph has against it.
        """
        errors = []
        for graph in reversed(self._graphs.graphs):
            try:
                policy.check(graph.branches)
            except ConfigError as error:
                errors.append(error)
            else:
                return graph.branches
        raise errors[0]

    def _warn_of_unknown_branches(self, graphs: Iterable[LazyGraph]) -> None:
        for graph in graphs:
            unknown = [branch.name for branch in graph.branches if branch.name not in self._planned]
            if unknown and self._policy.per_branch:
                logger.warning(
                    "calls of %s of one kind have %d branches that the policy was not made for (%s, ...); they compute",
                    type(self.original).__name__, len(unknown), unknown[0],
                )  # fmt: skip

    def _stats_of(self, graph: LazyGraph) -> LazyStats:
        names = tuple(branch.name for branch in graph.branches)
        if names not in self._stats:
            branch_macs = np.array([branch.macs for branch in graph.branches], dtype=np.float64)
            self._stats[names] = LazyStats(branch_macs, graph.total_macs)
        self._stats[names].captures = len(self._graphs.graphs)
        return self._stats[names]


def _rebuild(kind: type[LazyModule], original: nn.Module, config: LazyConfig, policy: Policy) -> LazyModule:
    lazy = kind(original, config)
    lazy._policy = policy
    return lazy
