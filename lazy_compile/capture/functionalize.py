"""Exported graphs in which nothing is written in place, and no composite operator hands on its input."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from lazy_compile.capture.evaluation import first_line
from lazy_compile.ir.operators import argument_of, value_of

aten = torch.ops.aten
logger = logging.getLogger("lazy_compile")


def functional(exported: ExportedProgram) -> ExportedProgram:
    """What ``exported.run_decompositions({})`` gives, in a tenth of its time for most graphs.

    That call traces the whole program twice. Here only what it would change is traced:

    1. A composite operator that may hand on its input (``reshape``, ``to``, ``chunk``) becomes what it does here.
    2. The views of a tensor and the writes to it become operators that write nothing, if nobody else reads it before
       the last write.
    3. A program that writes otherwise, or holds operators with graphs of their own (regions of ``autocast``), is traced
       as a whole after all.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))
    try:
        rewritten = _rewrite(graph)
    except Exception as error:  # whatever it is, there is another way
        logger.debug("the exported program is traced as a whole: %s", first_line(error))
        rewritten = False
    if not rewritten:
        whole: ExportedProgram = exported.run_decompositions({})
        return whole
    exported.graph_module.graph = graph
    return exported


def _rewrite(graph: fx.Graph) -> bool:
    """Rewrite a graph piece by piece; whether that can be done."""
    _normalise(graph)
    writes = _writes(graph)
    if writes is None or any(is_traceable_wrapper_subclass(value_of(node)) for node in graph.nodes):
        return False
    sizes = _Sizes(graph)
    later = {node for piece in writes.values() for node in piece.nodes}
    for node in list(graph.nodes):
        if node in writes:
            _replace(graph, writes[node], sizes)
        elif node not in later and _is_decomposed(node):
            _replace(graph, _Piece([node]), sizes)
        elif isinstance(size := value_of(node), torch.SymInt):
            sizes.nodes.setdefault(size.node.expr, node)
    return True


def _normalise(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # it would count as a reader of what is written
    for node in graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default):
        node.target = aten.clone.default
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if value_of(node).node.expr.is_number:  # the model turned out to take no other size
            node.replace_all_uses_with(int(value_of(node)))
            graph.erase_node(node)


@dataclass(frozen=True)
class _Piece:
    """Neighbouring nodes that are traced together.

    Attributes:
        nodes: in the order of the graph.
        written: the tensor that they write to; None if they do not.
    """

    nodes: Sequence[fx.Node]
    written: fx.Node | None = None

    @property
    def inputs(self) -> list[fx.Node]:
        inside = set(self.nodes)
        return list(dict.fromkeys(one for node in self.nodes for one in node.all_input_nodes if one not in inside))

    @property
    def results(self) -> list[fx.Node]:
        """What is read behind the piece; the tensor that is written to reads as it is then."""
        candidates = self.nodes if self.written is None else [self.written, *self.nodes]
        return [node for node in candidates if self.readers(node)]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user not in self.nodes]

    def __call__(self, *values: Any) -> list[Any]:
        seen = dict(zip(self.inputs, values, strict=True))
        if self.written is not None:
            seen[self.written] = seen[self.written].clone()
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), seen.__getitem__)
            seen[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [seen[node] for node in self.results]


class _Sizes:
    """Nodes for symbolic sizes: one for each, counted from the sizes of the graph's inputs where that can be done."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: dict[sympy.Expr, fx.Node] = {}
        self.axes: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        for node in graph.find_nodes(op="placeholder"):
            for axis, size in enumerate(getattr(value_of(node), "shape", ())):
                if isinstance(size, torch.SymInt):
                    self.axes.setdefault(size.node.expr, (node, axis))

    def node(self, graph: fx.Graph, size: torch.SymInt, origin: dict[str, Any]) -> fx.Node | None:
        """The node for a size, put before the place where the graph is written; None if no input has its symbols."""
        wanted = size.node.expr
        if wanted not in self.nodes:
            names = {known: sympy.Dummy(integer=True) for known in self.nodes}
            reduced = wanted.xreplace(names)
            proxies = {name: fx.Proxy(self.nodes[known]) for known, name in names.items()}
            for symbol in reduced.free_symbols - proxies.keys():
                if (node := self._symbol(graph, symbol)) is None:
                    return None
                proxies[symbol] = fx.Proxy(node)
            counted = sympy_interp(PythonReferenceAnalysis, proxies, reduced)
            _evaluate(counted.node, origin)
            self.nodes[wanted] = counted.node
        return self.nodes[wanted]

    def _symbol(self, graph: fx.Graph, symbol: sympy.Symbol) -> fx.Node | None:
        if symbol not in self.axes:
            return None
        placeholder, axis = self.axes[symbol]
        self.nodes[symbol] = node = graph.call_function(aten.sym_size.int, (placeholder, axis))
        node.meta["val"] = value_of(placeholder).shape[axis]
        return node


def _evaluate(node: fx.Node, origin: dict[str, Any]) -> None:
    """Note the value of a node that was counted from others, and theirs, and where they come from."""
    for source in node.all_input_nodes:
        if "val" not in source.meta:
            _evaluate(source, origin)
    assert callable(node.target)
    node.meta = {**origin, "val": node.target(*fx.map_arg(node.args, value_of))}


def _replace(graph: fx.Graph, piece: _Piece, sizes: _Sizes) -> None:
    """Put what a piece of the graph does in its place, in operators that hand on and write nothing."""
    with torch.no_grad(), enable_python_dispatcher():
        run = piece if piece.written is None else functionalize(piece)
        traced = make_fx(run)(*map(value_of, piece.inputs)).graph
    traced.eliminate_dead_code()
    last, readers = piece.nodes[-1], [(node, piece.readers(node)) for node in piece.results]
    copies = dict(zip(traced.find_nodes(op="placeholder"), piece.inputs, strict=True))
    origin = {name: value for name, value in last.meta.items() if name not in ("val", "tensor_meta")}
    with graph.inserting_before(last):
        for node in list(traced.nodes)[len(copies) : -1]:
            size = value_of(node)
            known = sizes.node(graph, size, origin) if isinstance(size, torch.SymInt) else None
            copies[node] = known or graph.node_copy(node, copies.__getitem__)
            if known is None:
                copies[node].meta = {**node.meta, **origin}
    values: Any = fx.map_arg(traced.output_node().args[0], copies.__getitem__)
    for (node, users), value in zip(readers, values, strict=True):
        for user in users:
            if isinstance(value, fx.Node):
                user.replace_input_with(node, value)
            else:
                user.replace_all_uses_with(value[user.args[1]])
                graph.erase_node(user)
    for node in reversed(piece.nodes):
        graph.erase_node(node)


def _is_decomposed(node: fx.Node) -> bool:
    """Whether functionalisation would take this operator apart."""
    target = node.target
    if not isinstance(target, OpOverload) or target in FunctionalTensor.metadata_fns:
        return False
    if target is aten.dropout.default and argument_of(node, "train") is False:
        return False
    return _is_cia_op(target) and not _is_preservable_cia_op(target)


def _writes(graph: fx.Graph) -> dict[fx.Node, _Piece] | None:
    """By the last write to each tensor that is written to: the views of it and the writes so far.

    None if one of them cannot be traced apart from the rest of the graph.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    owners: dict[fx.Node, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    last_writes: dict[fx.Node, fx.Node] = {}
    entangled = set()
    for node in graph.nodes:
        if node.op == "get_attr" or isinstance(node.target, HigherOrderOperator):
            return None
        written = {owners[source] for source in _written(node)}
        bases = written | {owners[source] for source in _handed_on(node)}
        if len(bases) > 1:
            entangled |= bases
        owners[node] = next(iter(bases), node)
        if bases:
            sharing.setdefault(owners[node], []).append(node)
        last_writes |= dict.fromkeys(written, node)
    pieces = {}
    for owner, last in last_writes.items():
        piece = _Piece([node for node in sharing[owner] if order[node] <= order[last]], owner)
        inside = set(piece.nodes)
        early = {user for node in (owner, *piece.nodes) for user in node.users if order[user] < order[last]}
        own = owner.op == "call_function" and isinstance(value_of(owner), Tensor) and not _is_decomposed(owner)
        if not own or owner in entangled or not early <= inside:
            return None
        pieces[last] = piece
    return pieces


def _handed_on(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose memory the result of an operator may share."""
    if node.target is operator.getitem or node.target is aten.dropout.default:
        yield from node.all_input_nodes
    elif isinstance(node.target, OpOverload):
        yield from _arguments(node, lambda alias: not alias.is_write)


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that an operator writes to."""
    if isinstance(node.target, OpOverload):
        yield from _arguments(node, lambda alias: alias.is_write)


def _arguments(node: fx.Node, wanted: Callable[[Any], bool]) -> Iterator[fx.Node]:
    assert isinstance(node.target, OpOverload)
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None and wanted(argument.alias_info):
            leaves = pytree.tree_leaves(argument_of(node, argument.name))
            yield from (item for item in leaves if isinstance(item, fx.Node))
