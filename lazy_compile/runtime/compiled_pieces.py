"""What ``torch.compile`` makes of a lazy model: the branches, and what lies between them, each kind once.

A gated graph is cut before and behind every branch. Pieces that do the same on tensors of the same sizes share one
compiled function, which takes the weights as arguments: the blocks of a transformer cost one compilation, whatever
their number, and all rows of a schedule run on the same pieces. Decisions, caches and rows stay as they are in eager
mode.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lazy_compile.capture.evaluation import first_line
from lazy_compile.errors import ConfigError
from lazy_compile.ir.lazy_branch import LazyBranch, lazy_calls
from lazy_compile.ir.program import Program

Piece = Callable[..., Any]


class CompiledPieces:
    """The compiled functions of one model.

    Args:
        options: those of ``torch.compile``.

    Attributes:
        backend: that of the ``torch.compile(lazy)`` which asked for them, see :func:`backend_of`; None if nobody did.

    Raises:
        ConfigError: ``torch.compile`` has no such options, or not together.
    """

    def __init__(self, **options: Any) -> None:
        try:
            torch.compile(_do_nothing, **options)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"torch.compile does not take {options}: {first_line(error)}") from error
        self._options = options
        self.backend: int | None = None
        self._pieces: dict[Any, _Piece] = {}
        wanted = options.get("mode") in ("reduce-overhead", "max-autotune")
        self.records_graphs = wanted or bool((options.get("options") or {}).get("triton.cudagraphs"))

    @property
    def compilations(self) -> int:
        """How many pieces were compiled; each at its first call."""
        return sum(piece.is_used for piece in self._pieces.values())

    def apply(self, program: Program) -> fx.GraphModule:
        """The graph of a gated program made of compiled pieces; its branches compute by compiled ones too."""
        for _, branch in lazy_calls(program):
            branch.replace_body(self._compiled(branch.body.graph, branch.body))
        return self._between_branches(program)

    def _between_branches(self, program: Program) -> fx.GraphModule:
        graph, root = fx.Graph(), dict(program.graph_module.named_children())
        modules: dict[str, nn.Module] = {}
        values: dict[fx.Node, fx.Node] = {}
        for stretch in _stretches(program):
            first = stretch[0]
            if first.op in ("placeholder", "output") or isinstance(root.get(str(first.target)), LazyBranch):
                for node in stretch:
                    values[node] = graph.node_copy(node, values.__getitem__)
                    if node.op == "call_module":
                        modules[str(node.target)] = root[str(node.target)]
                continue
            piece, inputs, outputs = _cut_out(stretch)
            name = f"between_{len(modules)}"
            modules[name] = self._compiled(piece, program.graph_module)
            call = graph.call_module(name, tuple(values[node] for node in inputs))
            for position, node in enumerate(outputs):
                values[node] = graph.call_function(operator.getitem, (call, position))
        return fx.GraphModule(modules, graph)

    def _compiled(self, graph: fx.Graph, root: nn.Module) -> _Piece:
        """The piece that does what a graph does, by positional arguments."""
        plain, metas = _nameless(graph)
        module = fx.GraphModule(root, plain)
        held = [node for node in plain.nodes if node.op in ("get_attr", "call_module")]
        key = (module.code, metas, tuple(id(_attribute(root, str(node.target))) for node in held))
        if key not in self._pieces:
            self._pieces[key] = _Piece(module, self._options, self.records_graphs)
        return self._pieces[key]


class _Piece(nn.Module):
    """A part of a graph, compiled at its first call.

    Where calls are recorded as CUDA graphs, the next one overwrites what this one returned: it is copied.
    """

    _run: list[Callable[..., Any]]
    is_used: bool

    def __init__(self, module: fx.GraphModule, options: Mapping[str, Any], copies: bool) -> None:
        super().__init__()
        self._run = [torch.compile(module, **options)]  # not a submodule: it has no state
        self._copies = copies
        self.is_used = False

    def forward(self, *inputs: Any) -> Any:
        self.is_used = True
        outputs = self._run[0](*inputs)
        if self._copies:
            return tuple(item.clone() if isinstance(item, Tensor) and item.is_cuda else item for item in outputs)
        return outputs


def traced_backend() -> int:
    """The number of the backend that Dynamo traces this for, see :func:`backend_of`; to be called within a trace."""
    backend: Any = "inductor"
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        backend = InstructionTranslator.current_tx().output.compiler_fn or backend
    except (ImportError, AttributeError):  # another release of torch keeps it elsewhere
        pass
    if backend not in _BACKENDS:
        _BACKENDS.append(backend)
    return _BACKENDS.index(backend)


def backend_of(number: int) -> Any:
    return _BACKENDS[number]


_BACKENDS: list[Any] = []


def _do_nothing() -> None:
    pass


def _stretches(program: Program) -> list[list[fx.Node]]:
    """The nodes of a gated graph in order: inputs, branches with what is taken out of their results, and all that lies
    between two of them."""
    branches = {call for call, _ in lazy_calls(program)}
    result: list[list[fx.Node]] = []
    kind_before = ""
    for node in program.graph.nodes:
        of_branch = node in branches or (node.target is operator.getitem and node.args[0] in branches)
        kind = node.op if node.op in ("placeholder", "output") else "branch" if of_branch else "between"
        if kind != kind_before:
            result.append([])
        result[-1].append(node)
        kind_before = kind
    return result


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


def _nameless(graph: fx.Graph) -> tuple[fx.Graph, tuple[Any, ...]]:
    """The same graph with names that follow from what it does, and what its inputs are."""
    plain = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    metas = []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        copies[node] = plain.placeholder(f"argument_{position}")
        value = node.meta.get("val")
        metas.append((str(tuple(value.shape)), value.dtype) if isinstance(value, Tensor) else type(value))
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        if node.op == "output":
            plain.output(args[0])
        else:
            copies[node] = plain.create_node(node.op, node.target, args, kwargs)
    return plain, tuple(metas)


def _attribute(root: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(root)
