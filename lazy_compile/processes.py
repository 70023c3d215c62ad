"""Several processes that do one piece of work together, as ``accelerate launch`` or ``torchrun`` starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those of its group; alone where there is no group.

    Every method but :meth:`share` is a collective: all processes call it, in the same order.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Of the default process group, which the caller's script (or accelerate) has set up."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @classmethod
    def beside(cls, collective_groups: Sequence[str]) -> Processes:
        """Those that work on other items than this one: none, where the model itself exchanges tensors between
        processes, as under context parallelism, so that all of them must make every call together."""
        return cls() if collective_groups else cls.here()

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and draws progress."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that this process works on; each belongs to exactly one."""
        return items[self.rank :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """Of all processes."""
        if self.count == 1:
            return tensor
        total = tensor.detach().to(_reached_by_group(tensor), copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; their shapes are equal."""
        if self.count == 1:
            return tensor
        mine = tensor.to(_reached_by_group(tensor)).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(parts, mine)
        return torch.cat(parts).to(tensor.device)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The group that a launcher's environment describes, while the block lasts; one that is there already stays."""
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    if own:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes.here()
    finally:
        if own:
            distributed.destroy_process_group()


def local_device(device: str) -> str:
    """``"cuda"`` is the GPU of this process, where a launcher gave each its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def averaged(tensor: Tensor, groups: Sequence[str]) -> Tensor:
    """The mean over the processes of some groups, by the names that functional collectives know them by; a collective.

    Where each holds as many tokens of one sample, the mean of their means is that of all tokens.
    """
    for group in map(_group, groups):
        tensor = tensor.detach().to(_reached_by_group(tensor), copy=True)
        distributed.all_reduce(tensor, group=group)
        tensor = tensor / distributed.get_world_size(group)
    return tensor


def agreed(value: int, groups: Sequence[str]) -> bool:
    """Whether all processes of some groups have the same whole number of up to 53 bits; a collective."""
    if not groups:
        return True
    ends = torch.tensor([value, -value], dtype=torch.float64)
    ends = ends.to(_reached_by_group(ends))
    for group in map(_group, groups):  # all of them, since those of one do not know what those of another found
        distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=group)
    largest, least = ends.tolist()
    return bool(largest == -least)


def _group(name: str) -> Any:
    return distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def is_shard(tensor: Tensor | None) -> bool:
    """Whether processes hold a tensor together, as under tensor parallelism and FSDP2 (``DTensor``)."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def groups_that_hold(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """The names of the groups whose processes hold some of these tensors together."""
    meshes = [tensor.device_mesh for tensor in tensors if is_shard(tensor)]  # type: ignore[attr-defined]
    return tuple(dict.fromkeys(group.group_name for mesh in meshes for group in mesh.get_all_groups()))


def groups_exchanging(operator: Any, arguments: Iterable[Any]) -> Iterator[str]:
    """The name of the group in which an operator exchanges tensors; none for what is no collective."""
    if "c10d" not in operator.namespace:
        return
    for argument in reversed(list(arguments)):
        if isinstance(argument, str):  # a functional collective, whose group comes behind the kind of reduction
            yield argument
            return
        if isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith("ProcessGroup"):
            yield distributed.ProcessGroup.unbox(argument).group_name
            return


def _reached_by_group(tensor: Tensor) -> torch.device:
    """Where processes can exchange a tensor: NCCL sees GPUs only."""
    hidden = tensor.device.type == "cpu" and distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if hidden else tensor.device
