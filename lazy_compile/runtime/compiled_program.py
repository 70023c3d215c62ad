"""What ``torch.compile`` makes of a gated graph: one call for each branch, or two where a decision lies between.

Where the decisions of a step are known when it begins, the graph of that step is cut behind every branch. A piece holds
what leads to a branch and its body, or the reuse arm in place of the body; what only a body reads (the norm and the
modulation before it) is left out with it. Else the graph is cut before and behind every branch, and each branch asks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from lazy_compile.ir.lazy_branch import LazyBranch, LazyStep, lazy_calls
from lazy_compile.ir.program import Program, Role
from lazy_compile.runtime.compiled_pieces import CompiledPieces

MAX_STEPS = 64
"""Kinds of steps whose graphs are kept: a schedule has no more than it has rows."""

MAX_FACTORS = 1024
"""Numbers that are kept on their device: a schedule needs one for each distance and slope that it has."""

Values = tuple[Tensor, ...]


@runtime_checkable
class FixedStep(Protocol):
    """A step whose decisions are known when it begins, and the same for all rows.

    Attributes:
        weights: for each branch that is reused how far it follows each earlier value, see
            :func:`lazy_compile.runtime.cache.along`; None if it computes.
        keeps: for each branch whether its slot outlives this step.
    """

    weights: Sequence[tuple[float, ...] | None]
    keeps: Sequence[bool]

    def stored(self, index: int) -> tuple[Values, Sequence[Values]]:
        """What the slot of a branch holds: the last values, and those before them."""

    def keep(self, index: int, kept: Values) -> None:
        """Store what a branch computed."""

    def drop(self, index: int) -> None:
        """Forget what a branch stored."""


class CompiledProgram:
    """A gated program, run by compiled pieces.

    Args:
        program: its branches compute by compiled bodies from now on.
        pieces: compiles them, and shares them with other programs.
    """

    def __init__(self, program: Program, pieces: CompiledPieces) -> None:
        self._program, self._pieces = program, pieces
        self._branches = [branch for _, branch in lazy_calls(program)]
        for branch in self._branches:
            branch.replace_body(pieces.compiled(branch.body.graph, branch.body))
        self._asking: fx.GraphModule | None = None
        self._fixed: dict[tuple[Any, ...], fx.GraphModule] = {}
        self._factors: dict[tuple[Any, ...], Tensor] = {}

    def run(self, arguments: Sequence[Any], step: LazyStep) -> Sequence[Any]:
        """The flat outputs of the model.

        Args:
            arguments: all inputs of the program but the step.
            step: what the branches do.
        """
        if isinstance(step, FixedStep):
            return self._run_fixed(arguments, step)
        if self._asking is None:
            self._asking = _cut(self._program.graph, self._program.graph_module, self._pieces, _between(self._program))
        outputs: Sequence[Any] = self._asking(*arguments, step)
        return outputs

    def _run_fixed(self, arguments: Sequence[Any], step: FixedStep) -> Sequence[Any]:
        arms = tuple([None if each is None else len(each) if any(each) else 0 for each in step.weights])
        keeps = tuple([keep and arm is None for keep, arm in zip(step.keeps, arms, strict=True)])
        if (arms, keeps) not in self._fixed:
            if len(self._fixed) >= MAX_STEPS:
                self._fixed.clear()
            self._fixed[arms, keeps] = self._graph_of(arms, keeps)
        reused = [item for branch in self._branches for item in self._reused(branch, arms[branch.index], step)]
        outputs = list(self._fixed[arms, keeps](*arguments, *reused))
        for branch in reversed(self._branches):
            if keeps[branch.index]:
                count = len(branch.branch.outputs)
                step.keep(branch.index, tuple(outputs[-count:]))
                del outputs[-count:]
            elif not step.keeps[branch.index]:
                step.drop(branch.index)
        return outputs

    def _reused(self, branch: LazyBranch, arm: int | None, step: FixedStep) -> Iterator[Tensor]:
        """What the reuse arm of a branch takes, in the order of :func:`_arm_inputs`."""
        if arm is None:
            return
        values, earlier = step.stored(branch.index)
        weights = step.weights[branch.index]
        assert weights is not None
        yield from values
        for degree in range(arm):
            yield from earlier[degree]
            yield self._factor(weights[degree], values[0])

    def _factor(self, weight: float, like: Tensor) -> Tensor:
        key = weight, like.dtype, like.device
        if key not in self._factors:
            if len(self._factors) >= MAX_FACTORS:
                self._factors.clear()
            self._factors[key] = torch.tensor(weight, dtype=_weight_dtype(like.dtype), device=like.device)
        return self._factors[key]

    def _graph_of(self, arms: Sequence[int | None], keeps: Sequence[bool]) -> fx.GraphModule:
        """The graph of a step in compiled pieces: it takes and returns what branches keep beside the model's own."""
        graph, places = _step_graph(self._program, arms, keeps)
        return _cut(graph, self._program.graph_module, self._pieces, places)


def _weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.float32


Places = dict[fx.Node, int | None]
"""Which piece a node belongs to; None if it is called as it is."""


def _between(program: Program) -> Places:
    """What lies between two branches is a piece; branches stay as they are, with what is taken out of their results."""
    branches = {call for call, _ in lazy_calls(program)}
    places: Places = {}
    piece = 0
    for node in program.graph.nodes:
        if node in branches:
            piece += 1
        of_branch = node in branches or (node.target is operator.getitem and node.args[0] in branches)
        places[node] = None if of_branch or node.op in ("placeholder", "output") else piece
    return places


def _step_graph(program: Program, arms: Sequence[int | None], keeps: Sequence[bool]) -> tuple[fx.Graph, Places]:
    """One arm of every branch, in one flat graph; a piece ends behind every branch."""
    calls = dict(lazy_calls(program))
    graph, places = fx.Graph(), Places()
    values: dict[fx.Node, Any] = {}
    kept: list[fx.Node] = []
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        if item.role is not Role.LAZY_STEP:
            last = values[node] = graph.node_copy(node)
    reused = {}
    for call, branch in calls.items():
        if (arm := arms[branch.index]) is not None:
            reused[call] = _arm_inputs(graph, branch, arm)
            last = reused[call][-1][-1]
    piece = 0
    for node in program.graph.nodes:
        if node in calls:
            branch = calls[node]
            inputs = [values[item] if isinstance(item, fx.Node) else item for item in node.args[1:]]
            if node in reused:
                outputs = _reuse_arm(graph, branch, inputs, reused[node])
            else:
                outputs = _compute_arm(graph, branch, inputs)
                if keeps[branch.index]:
                    kept += _kept(graph, branch, inputs, outputs)
            values[node] = outputs
        elif node.target is operator.getitem and node.args[0] in calls:
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
        while last.next.op != "root":
            last = last.next
            places[last] = piece
        piece += node in calls
    results = fx.node.map_arg(program.graph.output_node().args[0], values.__getitem__)
    graph.output((*results, *kept))  # type: ignore[misc]
    graph.eliminate_dead_code()
    return graph, places


def _arm_inputs(graph: fx.Graph, branch: LazyBranch, arm: int) -> list[list[fx.Node]]:
    """The inputs of a reuse arm: the last values, then for each degree the earlier ones and how much of them."""
    examples = [node.meta.get("val") for node in _outputs_of(branch.body)]
    factor = torch.empty((), dtype=torch.float64)

    def new(name: str, example: Any) -> fx.Node:
        node = graph.placeholder(f"slot_{branch.index}_{name}")
        node.meta["val"] = example
        return node

    values = [new(f"last_{position}", example) for position, example in enumerate(examples)]
    result = [values]
    for degree in range(arm):
        before = [new(f"before_{degree}_{position}", example) for position, example in enumerate(examples)]
        result.append([*before, new(f"factor_{degree}", factor)])
    return result


def _reuse_arm(
    graph: fx.Graph, branch: LazyBranch, inputs: Sequence[Any], slots: Sequence[Sequence[fx.Node]]
) -> list[fx.Node]:
    """``value + factor * (earlier - value) + ...``, as :func:`lazy_compile.runtime.cache.along`."""
    aten, results = torch.ops.aten, []
    for position, (value, base) in enumerate(zip(slots[0], branch.base_positions, strict=True)):
        example = value.meta["val"]
        result = value
        for degree, others in enumerate(slots[1:]):
            if not (example.is_floating_point() or example.is_complex()):
                break
            before, factor = others[position], others[-1]
            if example.dtype != slots[0][0].meta["val"].dtype:
                factor = graph.call_function(aten._to_copy.default, (factor,), {"dtype": example.dtype})
            if degree == 0:
                result = graph.call_function(aten.lerp.Tensor, (value, before, factor))
            else:
                difference = graph.call_function(aten.sub.Tensor, (before, value))
                scaled = graph.call_function(aten.mul.Tensor, (factor, difference))
                result = graph.call_function(aten.add.Tensor, (result, scaled))
        if base is not None:
            result = graph.call_function(aten.add.Tensor, (inputs[base], result))
        results.append(result)
    return results


def _compute_arm(graph: fx.Graph, branch: LazyBranch, inputs: Sequence[Any]) -> list[fx.Node]:
    """The body of a branch, inlined; the modules and attributes that it names are found from the program's module."""
    values: dict[fx.Node, Any] = dict(zip(branch.body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in branch.body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op in ("get_attr", "call_module"):
            values[node].target = f"lazy_branch_{branch.index}.body.{node.target}"
    return [values[node] for node in _outputs_of(branch.body)]


def _kept(graph: fx.Graph, branch: LazyBranch, inputs: Sequence[Any], outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """What a slot keeps, see :meth:`LazyBranch.kept`."""
    return [
        output if base is None else graph.call_function(torch.ops.aten.sub.Tensor, (output, inputs[base]))
        for output, base in zip(outputs, branch.base_positions, strict=True)
    ]


def _outputs_of(body: fx.GraphModule) -> list[fx.Node]:
    return list(body.graph.output_node().args[0])  # type: ignore[arg-type]


def _cut(graph: fx.Graph, root: nn.Module, pieces: CompiledPieces, places: Places) -> fx.GraphModule:
    """The same graph as calls of compiled pieces."""
    result, modules = fx.Graph(), dict[str, nn.Module]()
    values: dict[fx.Node, fx.Node] = {}
    for stretch in _stretches(graph, places):
        if places.get(stretch[0]) is None:
            for node in stretch:
                values[node] = result.node_copy(node, values.__getitem__)
                if node.op == "call_module":
                    modules[str(node.target)] = root.get_submodule(str(node.target))
            continue
        piece, inputs, outputs = _cut_out(stretch)
        name = f"piece_{len(modules)}"
        modules[name] = pieces.compiled(piece, root)
        call = result.call_module(name, tuple(values[node] for node in inputs))
        for position, node in enumerate(outputs):
            values[node] = result.call_function(operator.getitem, (call, position))
    return fx.GraphModule(modules, result)


def _stretches(graph: fx.Graph, places: Places) -> Iterator[list[fx.Node]]:
    """The nodes of a graph in order, those of one piece together."""
    stretch: list[fx.Node] = []
    for node in graph.nodes:
        if stretch and places.get(stretch[0]) != places.get(node):
            yield stretch
            stretch = []
        stretch.append(node)
    yield stretch


def _cut_out(stretch: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Neighbouring nodes as a graph of their own, what it reads from outside, and what is read of it there."""
    inside = set(stretch)
    inputs = list(dict.fromkeys(item for node in stretch for item in node.all_input_nodes if item not in inside))
    outputs = [node for node in stretch if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph, inputs, outputs
