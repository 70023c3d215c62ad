"""The transformed model: the original's signature around a gated graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazy_compile.capture.capture_folder import CaptureFolder
from lazy_compile.capture.lock import CAPTURE_LOCK
from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import Refusal, ResidualBranch
from lazy_compile.ir.lazy_branch import LazyStep
from lazy_compile.policies.policy import AlwaysCompute, Policy
from lazy_compile.policies.presets import PolicyLike, as_policy
from lazy_compile.processes import agreed
from lazy_compile.runtime.artifact import Artifact, describe, fingerprint, write
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.compiled_pieces import CompiledPieces, backend_of, traced_backend
from lazy_compile.runtime.granularity import cache_bytes, changes, fitting
from lazy_compile.runtime.graph_cache import GraphCache
from lazy_compile.runtime.host_hints import Known, current_stream, use_stream, use_trajectory
from lazy_compile.runtime.known_step import KnownStep, columns_of, known_step
from lazy_compile.runtime.lazy_graph import LazyGraph as LazyGraph
from lazy_compile.runtime.model_call import ModelCall as ModelCall
from lazy_compile.runtime.model_call import groups_of
from lazy_compile.runtime.placed_call import Placed
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.runtime.stats import LazyStats
from lazy_compile.runtime.step_invariants import follow
from lazy_compile.runtime.trajectory import Trajectories

logger = logging.getLogger("lazy_compile")


UNRELATED_CALLS = 8
"""Calls that each start a trajectory before somebody is told."""


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
        self._store = GraphCache(original, self._admit)
        self._policy: Policy = AlwaysCompute()
        self._planned: dict[str, ResidualBranch] = {}
        self._handler: Callable[[ModelCall], Any] = self._follow_policy
        self._trajectories = Trajectories()
        self._unrelated = 0
        self._fitted: LazyConfig | None = None
        self._stats: dict[tuple[str, ...], LazyStats] = {}
        self._pieces: CompiledPieces | None = None
        self._run = torch.compiler.disable(self._call)
        self._run_as_traced = torch.compiler.disable(self._call_as_traced)
        self._traced_backend = torch.compiler.assume_constant_result(traced_backend)

    # What the model does ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, under the current policy; arguments and result are those of the original."""
        if torch.compiler.is_dynamo_compiling():
            return self._run_as_traced(self._traced_backend(), args, kwargs)
        return self._run(*args, **kwargs)

    def _call_as_traced(self, backend: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``torch.compile(lazy)``: its backend compiles the pieces."""
        if self._pieces is None or self._pieces.backend not in (None, backend):
            self._compile_pieces(CompiledPieces(backend=backend_of(backend)), backend)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._store.follow_model()
        graph, tensors = self._graph_for(args, kwargs)
        placed = self._place(graph, tensors)
        try:
            result = self._run_placed(graph, tensors, placed)
        except BaseException:
            self._trajectories.abandon(placed)
            raise
        self._trajectories.commit(placed, graph.sampled_return(result))
        return result

    def _place(self, graph: LazyGraph, tensors: Sequence[Tensor]) -> Placed:
        axes = dict(graph.row_axes.values())
        named = {name: (tensors[index], axes.get(index)) for index, name in enumerate(graph.layout.names)}
        rows = next((int(tensors[index].shape[axis]) for index, axis in axes.items()), 1)
        latents = graph.latents
        contents = self._trajectories.identify(
            named,
            latents,
            graph.layout.names,
            graph.timestep_input,
            rows,
            (current_stream(), self._store.generation, graph.layout, graph.types),
        )
        placed = self._trajectories.place(contents, graph.branches)
        if not agreed(placed.digest, graph.collective_groups):
            placed.state = CacheState()  # a branch that one process computes and another reuses would wait for ever
            self._store.warn_once(
                f"processes that run one {type(self.original).__name__} together found different calls before this "
                "one, so that every branch computes; give all of them the same rows, or lazy.trajectory(key, step=i)"
            )
        self._warn_of_unrelated_calls(placed)
        return placed

    def _run_placed(self, graph: LazyGraph, tensors: Sequence[Tensor], placed: Placed) -> Any:
        weights: list[Any] = graph.state()
        groups = groups_of(placed)
        with CAPTURE_LOCK.running():
            invariants: Sequence[Tensor] = ()
            if self.lazy_config.hoist_step_invariants:
                known = self._trajectories.invariants(placed)
                known, graph, invariants = follow(known, graph, weights, tensors, self._store.hoisted)
                self._trajectories.keep_invariants(placed, known)
            step, timestep = groups[0].step, groups[0].timestep
            return self._handler(ModelCall(graph, weights, tensors, placed.state, step, timestep, groups, invariants))

    def _follow_policy(self, call: ModelCall) -> Any:
        for group in call.groups:
            if mismatch_reason := self._policy.mismatch_reason(group.step, group.timestep, group.before):
                self._store.warn_once(f"{type(self.original).__name__}: {mismatch_reason}")
        draft = call.caches.draft()
        step = self._step(call, draft)
        result = call.run(step)
        call.caches.adopt(draft)
        stats = self._stats_of(call.graph)
        stats.calls += 1
        step.record(stats)
        if isinstance(step, PolicyStep):
            call.graph.keep_signatures(call.tensors, step.signatures)
            if step.without_room:
                self._store.warn_once(
                    f"{type(self.original).__name__}: of a call of this size {step.without_room[0]!r} and others are "
                    "not cached and compute, since max_cache_bytes are taken"
                )
        return result

    def _step(self, call: ModelCall, draft: CacheState) -> KnownStep | PolicyStep:
        """What the branches do in a call: known when it begins, or asked at each of them."""
        graph, config, policy = call.graph, self.lazy_config, self._policy
        leaders = graph.leaders(config.group)
        planned = self._planned if policy.per_branch else None
        columns = columns_of(graph.branches, planned)
        signatures = graph.signatures(call.tensors)
        known = known_step(policy, config, draft, call.groups, columns, leaders, signatures)
        return known or PolicyStep(policy, config, draft, call.groups, planned, leaders, graph.collective_groups)

    def _warn_of_unrelated_calls(self, placed: Placed) -> None:
        """Nothing is ever reused where no call continues another: say it, once."""
        self._unrelated = self._unrelated + 1 if placed.is_unrelated else 0
        if self._unrelated == UNRELATED_CALLS and not isinstance(self._policy, AlwaysCompute):
            self._store.warn_once(
                f"the last {UNRELATED_CALLS} calls of {type(self.original).__name__} do not continue one another: the "
                "latents of each do not follow from an earlier call, so that every branch computes; if they belong to "
                "one trajectory, say so with lazy.trajectory(key, step=i)"
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
        """Capture now, for calls like this one; no step is counted, and the model is left as it was.

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
        return bool(self._store.graphs)

    @property
    def graph(self) -> LazyGraph:
        """The latest graph that is gated as ``lazy_config`` says.

        Raises:
            ConfigError: nothing was captured yet.
        """
        if not self._store.graphs:
            raise ConfigError("this model was not captured yet; call it once, or pass example_inputs to transform()")
        return self._store.of_structure(self.lazy_config)[-1]

    @property
    def capture_cache(self) -> Path | None:
        """The folder in which captures are kept, so that another process starts without one; None for nowhere.

        It is that of the environment variable ``LAZY_COMPILE_CACHE_DIR`` unless another one is set, before the model is
        captured. What lies there may be deleted at any time."""
        return None if self._store.folder is None else self._store.folder.path

    @capture_cache.setter
    def capture_cache(self, folder: str | Path | None) -> None:
        self._store.folder = None if folder is None else CaptureFolder.chosen(folder)

    @property
    def policy(self) -> Policy:
        """The rule that decides; a :class:`CacheSchedule` and the name of a preset may be set too, at any time."""
        return self._policy

    @policy.setter
    def policy(self, given: PolicyLike) -> None:
        policy = as_policy(given)
        if self._store.graphs:
            self._planned = {branch.name: branch for branch in self._branches_for(policy)}
        self._policy = policy
        logger.info("%s: %s", type(self.original).__name__, policy.describe())
        self._warn_of_unknown_branches(self._store.of_structure(self.lazy_config))
        self.reset()
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
        return cache_bytes(self.branches, self.lazy_config)

    # What can be changed ------------------------------------------------------------------------------------------

    def reset(self, stream: str | None = None) -> None:
        """Forget caches: the next call starts a trajectory.

        Args:
            stream: the name of a stream that has ended, see :meth:`stream`; None for all of them.
        """
        self._trajectories.reset(stream)

    def reset_stats(self) -> None:
        self._stats.clear()

    def stream(self, name: str) -> AbstractContextManager[None]:
        """Calls inside this context belong to streams of their own, named ``name``: the name is one more condition."""
        return use_stream(name)

    @contextmanager
    def trajectory(
        self, key: Hashable | Sequence[Hashable], *, step: int | Sequence[int] | None = None, steps: int | None = None
    ) -> Iterator[None]:
        """Calls inside this context belong to the trajectory ``key``; they need not be recognised by their latents.

        For hosts that know: servers, samplers that draw new noise at each step. Any thread may enter it.

        Args:
            key: names the request; a list of names, one for each row of the batch, for rows of several requests.
            step: which call of the trajectory this is, from 0; one for each row, or one for all. None counts the calls.
            steps: how many calls the trajectory has; its caches are dropped after the last. None keeps them until
                :meth:`end_trajectory`, or until it has long not been continued.

        Raises:
            ConfigError: keys and steps differ in number.
        """
        keys = tuple(key) if isinstance(key, list) else (key,)
        given: tuple[int | None, ...] = tuple(step) if isinstance(step, Sequence) else (step,)
        if len(given) not in (1, len(keys)):
            raise ConfigError(
                f"trajectory() takes one step, or one for each key; seen {len(keys)} keys, {len(given)} steps"
            )
        with use_trajectory(Known(keys, given)):
            yield
        if steps is not None:
            last = given if len(given) == len(keys) else given * len(keys)
            self.end_trajectory(
                *(name for name, now in zip(keys, last, strict=True) if now is not None and now + 1 >= steps)
            )

    def end_trajectory(self, *keys: Hashable) -> None:
        """Drop the caches of trajectories that are over, see :meth:`trajectory`."""
        self._trajectories.end(keys)

    def compile(self, **options: Any) -> None:
        """Compile the model in parts, with the options of ``torch.compile``, each at first use.

        Where the decisions of a step are known when it begins, a step is one compiled call for each branch, computed or
        reused. Else each branch decides between two of them. Parts that do the same are compiled once: the blocks of a
        transformer share their code, and so do all rows of a schedule. Any policy may be set afterwards.
        ``torch.compile(lazy)`` does the same. With CUDA graphs (``mode="reduce-overhead"``) each part is one graph.

        Raises:
            ConfigError: ``torch.compile`` has no such options, or not together.
        """
        self._compile_pieces(CompiledPieces(**options))

    def _compile_pieces(self, pieces: CompiledPieces, backend: int | None = None) -> None:
        pieces.backend = backend
        self._pieces = pieces
        for graph in self._store.graphs:
            graph.compile(pieces)

    @property
    def compilations(self) -> int:
        """How many parts of the model ``torch.compile`` was asked for so far, see :meth:`compile`."""
        return 0 if self._pieces is None else self._pieces.compilations

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
                capture=captured.strategy,
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
        return _rebuild, (type(self), self.original, self.lazy_config, self._policy, self.capture_cache)

    # How ----------------------------------------------------------------------------------------------------------

    def _graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LazyGraph, list[Tensor]]:
        graph, tensors = self._store.find(args, kwargs, self.lazy_config)
        if self.lazy_config.max_cache_bytes is None or self._fitted == self.lazy_config:
            return graph, tensors
        self._fitted = fitting(graph, self.lazy_config, any_granularity=not self._policy.per_branch)
        if self._fitted != self.lazy_config:
            logger.warning("%s: %s", type(self.original).__name__, changes(self.lazy_config, self._fitted))
            self.lazy_config = self._fitted
        return self._store.find(args, kwargs, self.lazy_config)

    def _admit(self, graph: LazyGraph) -> None:
        """Hold the policy against the first graph; in others, branches are matched to that one's by their names."""
        if not self._planned:
            self._policy.check(graph.branches)
            self._planned = {branch.name: branch for branch in graph.branches}
        if self._pieces is not None:
            graph.compile(self._pieces)
        self._warn_of_unknown_branches([graph])

    def _branches_for(self, policy: Policy) -> tuple[ResidualBranch, ...]:
        """Those of the latest graph that a policy fits: the graph of a call that skips layers has fewer.

        Raises:
            ConfigError: it fits none; what the latest graph has against it.
        """
        errors = []
        for graph in reversed(self._store.of_structure(self.lazy_config)):
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
        self._stats[names].captures = len(self._store.graphs)
        return self._stats[names]


def _rebuild(
    kind: type[LazyModule], original: nn.Module, config: LazyConfig, policy: Policy, capture_cache: Path | None
) -> LazyModule:
    lazy = kind(original, config)
    lazy._policy = policy
    lazy.capture_cache = capture_cache
    return lazy
