"""The captured graphs of one model: found for a call, made when missing, dropped when the model changes."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile import pass_pipelines
from lazy_compile.analysis.timestep_input import find_timestep_input, names_the_time
from lazy_compile.capture.call_layout import CallLayout, types_of
from lazy_compile.capture.capture_folder import CaptureFolder
from lazy_compile.capture.captured import Capture
from lazy_compile.capture.evaluation import comparable_evaluation
from lazy_compile.capture.ladder import capture
from lazy_compile.capture.lock import CAPTURE_LOCK
from lazy_compile.capture.model_snapshot import ModelWatch, changed_between, dropping_modules, hooked_modules
from lazy_compile.capture.restored_state import left_as_it_was
from lazy_compile.capture.restored_tensors import values_left_alone
from lazy_compile.config import LazyConfig
from lazy_compile.errors import CaptureError, ConfigError, NoBranchError
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.operators import has_formula, is_foreign_kernel, macs, operator_name
from lazy_compile.runtime.lazy_graph import LazyGraph, sources_of

logger = logging.getLogger("lazy_compile")

NUMBER_TOLERANCE = 1e-5
"""How far a model may answer otherwise to a tensor than to the same Python number, relative to its largest output."""

MODEL_STATES = 3
"""States of a model, adapters on and off say, whose graphs are kept beside those of the present one."""


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: CallLayout
    tensors: list[Tensor]
    types: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], numbers_as_tensors: Collection[str]) -> _Call:
        layout, tensors = CallLayout.of(args, kwargs, numbers_as_tensors)
        return cls(args, kwargs, layout, tensors, types_of(tensors))


class GraphCache:
    """Graphs of ``model``, the one used last at the end; at most ``max_captures`` of them.

    A Python number of the call becomes a tensor input where it is the time, or was seen to change, if the model takes
    it so and answers alike: else every value of it would need a graph of its own.

    Args:
        model: the original.
        admit: called with each new graph before it is kept; it may raise.

    Attributes:
        folder: where captures are kept from one process to the next; None for nowhere.
    """

    def __init__(self, model: nn.Module, admit: Callable[[LazyGraph], None]) -> None:
        self.model = model
        self.folder = CaptureFolder.chosen()
        self.graphs: list[LazyGraph] = []
        self._admit = admit
        self._watch: ModelWatch | None = None
        self._aside: list[tuple[ModelWatch, int, list[LazyGraph]]] = []
        self.generation = self._generations = 0
        self._numbers: set[str] = set()
        self._fixed_numbers: set[str] = set()
        self._told: set[str] = set()
        self._asked_for_dropout = False
        self._mutex = threading.Lock()
        self._signature = inspect.signature(model.forward)

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: LazyConfig) -> tuple[LazyGraph, list[Tensor]]:
        """The graph for a call, captured if there is none, and the call's flat tensors.

        Raises:
            ConfigError: the arguments are not those of the model.
            CaptureError: the model cannot be turned into a graph.
            NoBranchError: there is nothing to gate in it.
        """
        args, kwargs = self._bind(args, kwargs)
        if self.model.training:
            self._warn_of_dropout()
        call = _Call.of(args, kwargs, self._numbers)
        graph = self._lookup(call, config)
        if graph is None:
            with CAPTURE_LOCK.capturing():
                call = _Call.of(args, kwargs, self._numbers)
                graph = self._lookup(call, config)  # another thread may have made it in the meantime
                if graph is None and (other := self._lookup(call, None)) is not None:
                    graph = self._gated(other, config)
                if graph is None:
                    return self._capture(call, config)
        return graph, call.tensors

    def find_with_known_sizes(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], config: LazyConfig
    ) -> tuple[LazyGraph, list[Tensor]]:
        """The same, but no size depends on what is in a tensor: what the model reads is worked out, and guarded."""
        graph, tensors = self.find(args, kwargs, config)
        if graph.captured.has_open_sizes:
            args, kwargs = self._bind(args, kwargs)
            with CAPTURE_LOCK.capturing():
                graph = self._compile(_Call.of(args, kwargs, self._numbers), config, reads_values=True)
        return graph, tensors

    def hoisted(self, graph: LazyGraph, inputs: frozenset[str]) -> LazyGraph:
        """A graph that need not compute what only ``inputs`` and the weights decide; the same if nothing does.

        It has the branches of ``graph``, so that caches, policies and accounts of one serve the other.
        """
        with self._mutex:
            if inputs not in graph.hoisted:
                graph.hoisted[inputs] = self._hoist(graph, inputs)
            return graph.hoisted[inputs]

    def _hoist(self, graph: LazyGraph, inputs: frozenset[str]) -> LazyGraph:
        program = pass_pipelines.gating(graph.config, inputs).run(graph.captured.program)
        if program.prologue is None or list(map(_identity, program.branches)) != list(map(_identity, graph.branches)):
            return graph
        result = replace(graph, program=replace(program, branches=graph.branches))
        self._admit(result)
        return result

    def follow_model(self) -> None:
        """Set the graphs aside if modules, attributes, hooks or parameter types are others than at the capture.

        They come back with what they were captured for: adapters that are switched on and off capture once each.
        """
        if not self.graphs or self._watch is None or self._watch.still_holds():
            return
        watch = ModelWatch(self.model)
        with self._mutex:
            before = self._watch
            aside = [(before, self.generation, self.graphs), *self._aside]
            found = next((item for item in aside if item[0].observed == watch.observed), None)
            self._aside = [item for item in aside if item is not found][:MODEL_STATES]
            self._generations += found is None
            self.generation, self.graphs = (self._generations, []) if found is None else found[1:]
            self._watch = watch
        if found is None:
            self._warn_once_about(
                "%s is captured again because it changed: %s",
                [changed_between(self.model, before.observed, watch.observed)],
            )

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with every argument by name, so that its spelling does not matter."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{self._name}.forward: {error}; its signature is {self._signature}") from error
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
            return args, kwargs
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(sorted(arguments.pop(name).items()))
        return (), arguments

    def _lookup(self, call: _Call, config: LazyConfig | None) -> LazyGraph | None:
        """The graph that serves a call, gated as these options say, or in any way."""
        with self._mutex:
            structure = None if config is None else config.structure
            graphs = [graph for graph in reversed(self.graphs) if structure in (None, graph.config.structure)]
            found = next((graph for graph in graphs if _serves(graph, call)), None)
            if found is not None and found is not self.graphs[-1]:
                self.graphs = [*(graph for graph in self.graphs if graph is not found), found]
        return found

    def _capture(self, call: _Call, config: LazyConfig) -> tuple[LazyGraph, list[Tensor]]:
        changed = {path for graph in self.graphs for path in graph.layout.changed_numbers(call.layout)}
        times = {path for path in call.layout.numbers if names_the_time(path, config.timestep_input)}
        numbers = (changed | times) - self._fixed_numbers
        if numbers:
            loosened = _Call.of(call.args, call.kwargs, self._numbers | numbers)
            graph = self._take_as_tensors(numbers, loosened, config)
            if graph is not None:
                return graph, loosened.tensors
        if changed:
            self._warn_once_about(
                "%s was captured again for another value of the Python number %s: such a value is part of the graph; "
                "pass what changes from step to step as a tensor",
                changed,
            )
        self._warn_of_values(call, config)
        self._warn_of_sizes(call, config)
        return self._compile(call, config), call.tensors

    def _take_as_tensors(self, numbers: set[str], call: _Call, config: LazyConfig) -> LazyGraph | None:
        """A graph in which ``numbers`` are inputs; None if the model does not take tensors for them, or answers
        otherwise to them."""
        named = ", ".join(sorted(numbers))
        try:
            graph = self._compile(call, config, numbers)
        except (CaptureError, NoBranchError) as error:
            self._fixed_numbers |= numbers
            logger.info("%s takes no tensor for the Python number %s: %s", self._name, named, error)
            return None
        self._numbers |= numbers
        logger.info("%s: the Python number %s is an input of the graph, as a tensor", self._name, named)
        return graph

    def _compile(
        self, call: _Call, config: LazyConfig, numbers: Collection[str] = (), *, reads_values: bool = False
    ) -> LazyGraph:
        captured = capture(self.model, call.layout, call.tensors, reads_values=reads_values, folder=self.folder)
        self._check_numbers(captured, call, numbers)
        watch = ModelWatch(self.model)
        if self._watch is None or watch.observed != self._watch.observed:
            self.graphs, self._watch = [], watch
            self._warn_of_hooks()
        if self.graphs:
            logger.info("captured another graph, for inputs %s", [tuple(tensor.shape) for tensor in call.tensors])
        timestep = find_timestep_input(captured.program, config.timestep_input)
        if timestep is None:
            logger.warning(
                "no timestep input was found in %s: every call counts as the next step; "
                "name it with LazyConfig(timestep_input=...), or call reset() before each trajectory",
                self._name,
            )
        self._warn_of_kernels(captured)
        total = sum(macs(node) for node in captured.program.graph.nodes)
        graph = LazyGraph(call.layout, captured, captured.program, timestep, call.types, total, (), config)
        return self._gated(graph, config)

    def of_structure(self, config: LazyConfig) -> list[LazyGraph]:
        """The graphs that are gated as these options say; if there are none, the latest one gated anew."""
        found = [graph for graph in self.graphs if graph.config.structure == config.structure]
        return found or [self._gated(graph, config) for graph in self.graphs[-1:]]

    def _gated(self, graph: LazyGraph, config: LazyConfig) -> LazyGraph:
        """A graph of the same capture for these options."""
        program = pass_pipelines.gating(config).run(graph.captured.program)
        if not program.branches:
            reasons = "; ".join(f"{refusal.path or refusal.node}: {refusal.reason}" for refusal in program.refusals[:3])
            raise NoBranchError(
                f"{self._name} has no residual branch that could be gated "
                f"({reasons or 'no addition joins a skip connection with heavy operators'})"
            )
        for refusal in program.refusals:
            if not refusal.node:  # of the model as a whole
                self.warn_once(f"{self._name}, granularity={config.granularity!r}: {refusal.reason}")
        graph = replace(graph, program=program, config=config, sources=tuple(sources_of(self.model, program)))
        self._admit(graph)
        with self._mutex:
            self.graphs = [*self.graphs, graph][-config.max_captures :]
        return graph

    def _check_numbers(self, captured: Capture, call: _Call, numbers: Collection[str]) -> None:
        """Refuse a capture in which a tensor does not stand for a Python number as it should."""
        read = [call.layout.names[position] for position in captured.values.inputs]
        if set(read) & set(numbers):
            raise CaptureError(f"it decides by the value of {', '.join(read)}")
        if not numbers or any(tensor.is_meta for tensor in call.tensors):
            return
        state = [values[name] for values, name in sources_of(self.model, captured.program)]
        with comparable_evaluation(self.model), left_as_it_was(self.model), values_left_alone(self.model):
            seen = _tensors(captured.program.graph_module(*state, *call.tensors))
            expected = _tensors(self.model(*call.args, **call.kwargs))
        if not all(map(_alike, seen, expected)):
            raise CaptureError("it answers otherwise to the tensor than to the number")

    def _warn_of_values(self, call: _Call, config: LazyConfig) -> None:
        for graph in self.graphs:
            if graph.differs_in_values(call.layout, call.tensors, call.types):
                self._warn_once_about(
                    "%s was captured again because it reads the values of %s, and they changed: each answer has a "
                    f"graph of its own, and at most {config.max_captures} are kept (LazyConfig.max_captures)",
                    graph.guarded_inputs,
                )

    def _warn_of_sizes(self, call: _Call, config: LazyConfig) -> None:
        for graph in self.graphs:
            if graph.layout == call.layout and graph.types == call.types:
                self._warn_once_about(
                    "%s was captured again because it fixes sizes of its inputs, and they changed (%s): each has a "
                    f"graph of its own, and at most {config.max_captures} are kept (LazyConfig.max_captures)",
                    graph.captured.fixed_sizes(graph.layout.names, call.tensors),
                )

    def _warn_of_hooks(self) -> None:
        hooked = hooked_modules(self.model)
        if hooked:
            self._warn_once_about(
                "%s has forward hooks on %s: what they compute is part of the graph, but they run while it is "
                "captured only; hook the lazy model itself, or restore() the original to record activations",
                hooked[:3],
            )

    def _warn_of_dropout(self) -> None:
        if not self._asked_for_dropout and (dropping := dropping_modules(self.model)):
            logger.warning(
                "%s is in training mode and drops values (%s), which its graph does not: a lazy model computes as in "
                "evaluation mode; call eval() on it, or train the original",
                self._name, ", ".join(dropping[:3]),
            )  # fmt: skip
        self._asked_for_dropout = True

    def _warn_of_kernels(self, captured: Capture) -> None:
        nodes = captured.program.graph.nodes
        unknown = {operator_name(node) for node in nodes if is_foreign_kernel(node) and not has_formula(node)}
        if unknown:
            self._warn_once_about(
                "%s calls %s, whose work is not known and counts as none, so that what is saved is misjudged; say what "
                "it costs with torch.utils.flop_counter.register_flop_formula",
                unknown,
            )

    def _warn_once_about(self, message: str, names: Collection[str]) -> None:
        if names:
            self.warn_once(message % (self._name, ", ".join(sorted(names))))

    def warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def _identity(branch: ResidualBranch) -> tuple[Any, ...]:
    return branch.name, branch.kind, branch.gate_features, len(branch.outputs), branch.row_separable


def _serves(graph: LazyGraph, call: _Call) -> bool:
    return graph.serves(call.layout, call.tensors, call.types)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _alike(seen: Tensor, expected: Tensor) -> bool:
    if seen.shape != expected.shape or seen.dtype != expected.dtype:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(seen, expected, rtol=0.0, atol=NUMBER_TOLERANCE * scale, equal_nan=True)
