"""From a graph with marks and copies, see :mod:`lazy_compile.capture.regions`, to the graph of the whole model."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lazy_compile.capture.regions import Regions, Unlike
from lazy_compile.ir.operators import is_random, value_of
from lazy_compile.ir.program import Program

Nodes = dict[fx.Node, fx.Node]


def require_unwritten(exported: ExportedProgram, regions: Regions) -> None:
    """Look at a graph before it is made functional.

    Raises:
        Unlike: something writes to what a region returned, which may share memory with what it did not return. Or a
            repeat was unlike, and the model went on nevertheless.
    """
    if regions.unlike:
        raise Unlike(regions.unlike)
    if not regions.are_used:
        return
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    returned = {memory for node in nodes if _is_returned(node) for memory in _memory(node)}
    for node in nodes:
        if any(memory in returned for written in _written(node) for memory in _memory(written)):
            raise Unlike(f"{node.name} writes to what a repeated module returned")


def _is_returned(node: fx.Node) -> bool:
    return node.target is operator.getitem and cast(fx.Node, node.args[0]).target in (_END, _COPY)


def _memory(value: Any) -> Iterator[int]:
    """Where tensors lie, as far as export knows."""
    for leaf in pytree.tree_leaves(value_of(value) if isinstance(value, fx.Node) else value):
        if isinstance(leaf, fx.Node):
            yield from _memory(leaf)
        elif isinstance(leaf, Tensor):
            yield leaf.untyped_storage()._cdata


def _written(node: fx.Node) -> Iterator[Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield given.get(argument.name)


def with_copies(program: Program, regions: Regions) -> Program:
    """The program without marks and unread values, and with the nodes of a region in place of each copy of it.

    Raises:
        Unlike: a region is not a function of its arguments.
    """
    if not regions.are_used:
        _erase_unread(program.graph)
        return program
    nodes = list(program.graph.nodes)
    bodies = _bodies(nodes)
    marks = [node.target for node in nodes]
    if (marks.count(_END), marks.count(_COPY)) != (len(regions.captured), regions.copies):
        raise Unlike("a repeated module is called inside of another graph")
    graph = fx.Graph()
    new: Nodes = {}
    for node in nodes:
        if _is_returned(node):
            continue
        if node.target is _END:
            _assign(node, bodies[_handle(node)].made, new, new)
        elif node.target is _COPY:
            body = bodies[_handle(node)]
            _assign(node, body.made, body.copied_into(graph, node, new), new)
        elif node.target is not _BEGIN:
            new[node] = _copy(graph, node, new.__getitem__)
    _erase_unread(graph)
    return replace(program, graph_module=fx.GraphModule(program.graph_module, graph))


def _erase_unread(graph: fx.Graph) -> None:
    """Erase what nobody reads; torch takes a dropout that drops nothing for a random operator."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure(impure_random=is_random(node)):
            graph.erase_node(node)


def _assign(node: fx.Node, made: Sequence[fx.Node], known: Nodes, new: Nodes) -> None:
    """Those that read a result of a mark or copy read what it stands for."""
    for user in node.users:
        new[user] = known[made[cast(int, user.args[1])]]


def _bodies(nodes: Sequence[fx.Node]) -> dict[int, _Body]:
    places = {node: place for place, node in enumerate(nodes)}
    bodies: dict[int, _Body] = {}
    for end in [node for node in nodes if node.target is _END]:
        begin, made = cast(fx.Node, end.args[1]), cast(Sequence[fx.Node], end.args[2])
        bodies[_handle(end)] = body = _Body(begin, nodes[places[begin] + 1 : places[end]], made)
        body.check()
    for node in nodes:
        if node.target is _COPY and _handle(node) not in bodies:
            raise Unlike(f"{node.name} is a copy of what is not there")
    return bodies


@dataclass
class _Body:
    """The nodes between two marks.

    Attributes:
        made: what the region returns.
    """

    begin: fx.Node
    nodes: Sequence[fx.Node]
    made: Sequence[fx.Node]

    def check(self) -> None:
        """
        Raises:
            Unlike: it reads more than it is given, sizes apart, or holds what cannot be copied.
        """
        known = {*self.nodes, *_given(self.begin)}
        for node in self.nodes:
            if node.op != "call_function" or node.target in (_BEGIN, _END, _COPY):
                raise Unlike(f"a repeated module holds {node.name}")
            for source in node.all_input_nodes:
                if source not in known and not isinstance(value_of(source), torch.SymInt | int):
                    raise Unlike(f"a repeated module reads {source.name}, which it is not given")

    def copied_into(self, graph: fx.Graph, copy: fx.Node, new: Nodes) -> Nodes:
        """The nodes of a copy, and what they read, by those of the body."""
        known: Nodes = {}
        for inner, outer in zip(_given(self.begin), _given(copy), strict=True):
            if known.setdefault(inner, new[outer]) is not new[outer]:
                raise Unlike(f"{inner.name} stands for two values")
        for node in self.nodes:
            known[node] = _copy(graph, node, lambda source: known.get(source) or new[source])
            _move(known[node], self.begin, copy)
        return known


def _copy(graph: fx.Graph, node: fx.Node, known: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Nodes are numbered anew, in their order."""
    if node.op != "call_function":
        return graph.node_copy(node, known)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known)
    copy = graph.create_node(node.op, node.target, args, kwargs, re.sub(r"_\d+$", "", node.name), node.type)
    copy.meta = dict(node.meta)
    return copy


def _move(node: fx.Node, begin: fx.Node, copy: fx.Node) -> None:
    """What a copied node notes of where it comes from: its module and its lines."""
    before, after = begin.meta, copy.meta
    node.meta["module_path"] = after["module_path"] + node.meta["module_path"].removeprefix(before["module_path"])
    there, here = before["nn_module_stack"], after["nn_module_stack"]
    (old_key, (old_path, _)), (new_key, (new_path, _)) = list(there.items())[-1], list(here.items())[-1]
    inner = list(node.meta["nn_module_stack"].items())[len(there) :]
    node.meta["nn_module_stack"] = here | {
        new_key + key.removeprefix(old_key): (new_path + path.removeprefix(old_path), kind)
        for key, (path, kind) in inner
    }
    lines = node.meta.get("stack_trace") or ""
    if lines.startswith(before.get("stack_trace") or "\n"):
        node.meta["stack_trace"] = after["stack_trace"] + lines.removeprefix(before["stack_trace"])


def _handle(mark: fx.Node) -> int:
    return cast(int, mark.args[0])


def _given(mark: fx.Node) -> list[fx.Node]:
    _, tensors, weights = cast(tuple[int, list[fx.Node], list[fx.Node]], mark.args)
    return [*tensors, *weights]


_BEGIN = torch.ops.lazy_compile.region_begin.default
_END = torch.ops.lazy_compile.region_end.default
_COPY = torch.ops.lazy_compile.region_copy.default
