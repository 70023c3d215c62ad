"""A backend of ``torch.compile``: what Dynamo traces is made lazy.

>>> model = torch.compile(model, backend="lazy_compile", options={"reuse": "linear"})  # doctest: +SKIP
>>> model(**inputs)                                                                    # doctest: +SKIP
>>> lazy = lazy_compile.integrations.dynamo.lazy_modules()[-1]                         # doctest: +SKIP
>>> lazy.policy = Scheduled(schedule)                                                  # doctest: +SKIP

``lazy_compile.transform(model)`` does the same without Dynamo, and should be preferred where the model can be replaced.
The backend is for code that only takes a backend's name. Dynamo fixes the sizes of its first call: decisions are then
taken per call, not per row. ``torch.compile(..., dynamic=True)`` keeps the rows apart.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lazy_compile.config import LazyConfig, chosen_config
from lazy_compile.errors import NoBranchError
from lazy_compile.policies.policy import Policy
from lazy_compile.runtime.module import LazyModule

logger = logging.getLogger("lazy_compile")

_made: list[weakref.ref[LazyModule]] = []


def lazy_modules() -> list[LazyModule]:
    """The lazy models that this backend has made and that are still in use, the latest last: to set policies on."""
    _made[:] = [reference for reference in _made if reference() is not None]
    return [lazy for reference in _made if (lazy := reference()) is not None]


def backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph of Dynamo; it is captured at its first call. A graph without branches runs as it is.

    Args:
        graph_module: from Dynamo, with parameters and buffers among its inputs.
        example_inputs: not used.
        options: of ``torch.compile``: ``policy``, and the fields of :class:`~lazy_compile.config.LazyConfig`.

    Raises:
        ConfigError: an option is not known.
    """
    chosen = dict(options or {})
    policy = chosen.pop("policy", None)
    run: Callable[..., Any] = torch.compiler.disable(_Compiled(graph_module, chosen_config(None, chosen), policy))
    return run


class _TracedModel(nn.Module):
    """A graph of Dynamo whose parameters and buffers are its own again, under the names that Dynamo gave them."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self._graph_module = [graph_module]  # not a submodule: it has no state of its own
        self.static: dict[int, str] = {}
        self.inputs = len(graph_module.graph.find_nodes(op="placeholder"))
        for node in graph_module.graph.nodes:
            stack = node.meta.get("nn_module_stack", {})
            node.meta["nn_module_stack"] = {key: (_path(path), kind) for key, (path, kind) in stack.items()}

    def bind(self, arguments: Sequence[Any]) -> list[Any]:
        """Take the state out of a call's arguments; what is left are the user's."""
        placeholders = self._graph_module[0].graph.find_nodes(op="placeholder")
        for position, (node, value) in enumerate(zip(placeholders, arguments, strict=True)):
            if not _is_state(node, value):
                continue
            name = self.static.setdefault(position, node.name)
            if isinstance(value, nn.Parameter):
                self._parameters[name] = value
            else:
                self._buffers[name] = value
        return [value for position, value in enumerate(arguments) if position not in self.static]

    def forward(self, *given: Any) -> Any:
        user = iter(given)
        values = [
            getattr(self, self.static[position]) if position in self.static else next(user)
            for position in range(self.inputs)
        ]
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(self._graph_module[0]).run(*values)


class _Compiled:
    def __init__(self, graph_module: fx.GraphModule, config: LazyConfig, policy: Policy | None) -> None:
        self._dense = graph_module
        self._model = _TracedModel(graph_module)
        self._lazy: LazyModule | None = LazyModule(self._model, config)
        if policy is not None:
            self._lazy.policy = policy
        _made.append(weakref.ref(self._lazy))

    def __call__(self, *arguments: Any) -> Any:
        user = self._model.bind(arguments)
        if self._lazy is not None:
            try:
                return self._lazy(*user)
            except NoBranchError as error:
                logger.warning("a graph of torch.compile runs dense: %s", error)
                self._lazy = None
        return self._dense(*arguments)


def _path(source: str) -> str:
    """Dynamo writes ``L['self'].blocks.0`` for ``blocks.0``."""
    return source.removeprefix("L['self']").lstrip(".")


def _is_state(node: fx.Node, value: Any) -> bool:
    """Parameters, and what Dynamo marks as the state of a module."""
    if isinstance(value, nn.Parameter):
        return True
    return isinstance(value, Tensor) and "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
