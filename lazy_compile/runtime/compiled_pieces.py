"""Parts of a graph that ``torch.compile`` compiles, each kind once.

Parts that do the same on tensors of the same sizes share one compiled function, which takes the weights as arguments:
the blocks of a transformer cost one compilation, whatever their number. What the parts of a lazy model are says
:mod:`lazy_compile.runtime.compiled_program`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lazy_compile.capture.evaluation import first_line
from lazy_compile.errors import ConfigError

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

    def compiled(self, graph: fx.Graph, root: nn.Module) -> nn.Module:
        """The piece that does what a graph does, by positional arguments.

        Args:
            graph: its placeholders in the order of the arguments.
            root: holds the modules and attributes that it names.
        """
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
        self._run = [torch.compile(module.forward, **options)]  # the method: calling a compiled module takes longer
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
