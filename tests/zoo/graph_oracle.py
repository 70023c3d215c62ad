"""What a lazy model must return, for any model: its captured graph run operator by operator, with values replaced.

No pass has touched the graph. Of each branch only the names of its outputs are taken: where the branch is to be reused,
the value of such a node is replaced by what it was, or where a line through its last two values leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.program import Program, module_state


class GraphOracle:
    """Steps through a trajectory.

    Args:
        model: whose weights are read.
        program: the capture, before any pass.
        branches: cut points.
        should_compute: ``bool[steps, branches]``.
        reuse: ``"last"`` or ``"linear"``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        program: Program,
        branches: Sequence[ResidualBranch],
        should_compute: np.ndarray,
        reuse: str,
    ) -> None:
        self.state, self.program, self.reuse = module_state(model), program, reuse
        self.should_compute = should_compute
        self.branch_of = {output.name: branch.index for branch in branches for output in branch.outputs}
        missing = set(self.branch_of) - {node.name for node in program.graph.nodes}
        assert not missing, f"the captured graph has no {', '.join(sorted(missing))}"
        self.computed: dict[str, list[tuple[int, Tensor]]] = {}
        self.step = 0

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the model returns for these inputs, at the next step."""
        values = dict(zip(self.program.placeholders, self.program.bind(self.state, tensors), strict=True))
        same = _Same()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                twin = same.twin(node, values)
                values[node] = values[twin] if twin else self._replaced(node, self._evaluate(node, values))
            elif node.op == "get_attr":
                values[node] = getattr(self.program.graph_module, node.target)
            elif node.op == "output":
                returned = fx.map_arg(node.args[0], values.__getitem__)
        self.step += 1
        return [value for value in returned if isinstance(value, Tensor)]

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)

    def _replaced(self, node: fx.Node, fresh: Any) -> Any:
        if node.name not in self.branch_of:
            return fresh
        history = self.computed.setdefault(node.name, [])
        if self.should_compute[self.step, self.branch_of[node.name]] or not history:
            history.append((self.step, fresh))
            return fresh
        step, value = history[-1]
        if self.reuse == "last" or len(history) < 2 or not (value.is_floating_point() or value.is_complex()):
            return value
        step_before, value_before = history[-2]
        return value + (self.step - step) / (step - step_before) * (value - value_before)


class _Same:
    """Which nodes are bound to be equal to an earlier one: the same operator on the same values.

    A model may compute one thing twice; a branch that ends in it is cut at the first of the two, for both.
    """

    def __init__(self) -> None:
        self.first: dict[Any, fx.Node] = {}
        self.source: dict[fx.Node, fx.Node] = {}

    def twin(self, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node | None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._root)
        if node.target in _COPIES and _unchanged(node, values):
            self.source[node] = self._root(node.args[0])
            return self.source[node]
        key = (node.target, repr(args), repr(kwargs))
        first = self.first.setdefault(key, node)
        if first is node:
            return None
        self.source[node] = first
        return first

    def _root(self, node: fx.Node) -> fx.Node:
        return self.source.get(node, node)


def _unchanged(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    after, before = node.meta["val"], values[node.args[0]]
    kept = node.kwargs.get("memory_format") in (None, torch.preserve_format)
    return kept and (after.dtype, after.dim()) == (before.dtype, before.dim())


aten = torch.ops.aten
_COPIES = {aten.clone.default, aten.alias.default, aten._to_copy.default}
