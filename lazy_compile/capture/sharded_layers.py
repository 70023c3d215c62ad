"""Layers whose weights processes hold together, as tensor parallelism splits them: their hooks take part in the call.

``torch.distributed.tensor.parallel`` keeps a share of the weights in each process. A hook of the layer makes a
``DTensor`` of what it is given, and another makes a tensor of what it returns.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.errors import CaptureError
from lazy_compile.processes import is_shard


def has_shards(module: nn.Module) -> bool:
    """Whether processes hold weights of its own together."""
    return any(map(is_shard, module._parameters.values()))


def call_with_hooks(module: nn.Module, path: str) -> Callable[..., Any]:
    """A call of a module with the hooks that it has, whatever is put in their place later.

    Raises:
        CaptureError: tensors that processes hold together go in or come out.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor  # not in every build of torch

    same = copy.copy(module)  # shares its weights and hooks

    def call(*args: Any, **kwargs: Any) -> Any:
        result = pytree.tree_map_only(AsyncCollectiveTensor, AsyncCollectiveTensor.trigger_wait, same(*args, **kwargs))
        leaves = pytree.tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, Tensor) and is_shard(leaf) for leaf in leaves):
            raise CaptureError(
                f"{path} takes or returns a DTensor, and a lazy model caches whole tensors; parallelize it so that "
                "layers pass tensors on (ColwiseParallel() before RowwiseParallel(), without SequenceParallel)"
            )
        return result

    return call


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Within this context only ``forward`` runs."""
    hooks = {name: vars(module)[name] for name in _HOOKS}
    vars(module).update((name, OrderedDict()) for name in _HOOKS)
    try:
        yield
    finally:
        vars(module).update(hooks)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
