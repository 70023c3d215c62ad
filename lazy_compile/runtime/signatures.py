"""What the slot of a branch must agree with to be reused: the branch, and the types of its entries and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.ir.lazy_branch import LazyBranch, lazy_calls
from lazy_compile.ir.program import Program

Signature = tuple[Any, ...]


def signature_of(branch: LazyBranch, inputs: Sequence[Any]) -> Signature:
    """Of a branch at a call. The number of rows comes last, and no size counts it before."""
    entries = []
    for position in branch.entry_positions:
        entry = inputs[position]
        axis = branch.row_axes[position] if branch.branch.row_separable else None
        shape = [size for index, size in enumerate(entry.shape) if index != axis]
        entries.append((*shape, entry.dtype, entry.device))
    return branch.branch.name, *entries, *(output.dtype for output in branch.branch.outputs), branch.rows(inputs)


def expected_signatures(
    program: Program, fakes: Sequence[Tensor], tensors: Sequence[Tensor]
) -> dict[int, Signature] | None:
    """Those of all branches at a call that was not made yet, worked out from its sizes; None where they do not follow.

    Args:
        fakes: what the program knows of the user's tensors; their sizes may be symbols.
        tensors: those of the call.
    """
    sizes: dict[Any, int] = {}
    for fake, tensor in zip(fakes, tensors, strict=True):
        for size, length in zip(_sizes(fake), tensor.shape, strict=True):
            if not isinstance(size, int):
                sizes[size.node.expr] = length
    result = {}
    for call, branch in lazy_calls(program):
        values = [item.meta.get("val") if isinstance(item, fx.Node) else item for item in call.args[1:]]
        try:
            inputs = [_Expected.of(value, sizes) if isinstance(value, Tensor) else value for value in values]
        except TypeError:  # a size that follows from no size of an input
            return None
        result[branch.index] = signature_of(branch, inputs)
    return result


@dataclass(frozen=True)
class _Expected:
    """What a tensor will be like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor, sizes: Mapping[Any, int]) -> _Expected:
        shape = [size if isinstance(size, int) else int(size.node.expr.xreplace(sizes)) for size in _sizes(value)]
        return cls(tuple(shape), value.dtype, value.device)


def _sizes(fake: Tensor) -> Sequence[Any]:
    """Numbers and symbols."""
    return fake.shape
