from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.ir.program import Program, Role
from lazy_compile.passes.discover_branches import DiscoverBranches
from lazy_compile.passes.insert_gates import InsertGates
from lazy_compile.passes.outline_branches import OutlineBranches
from support.graph_text import after, program, text

SOURCE = """
    x: f32[B, N, 8]
    c: f32[B, 1, 8]
    mask: f32[N, 1, B]
    w: param f32[8, 8]
    z = mul.Tensor(x, c)
    t = permute(z, [1, 2, 0])
    m = mul.Tensor(t, mask)
    p = permute(m, [2, 0, 1])
    f = linear(p, w)
    d = linear(f, w)
    y = add.Tensor(x, d)
    return y
"""


class Compute:
    """A step in which every branch computes, and that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[LazyBranch, Sequence[Any]]] = []

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        self.seen.append((branch, inputs))
        return branch.compute(inputs)


def outlined(source: str = SOURCE) -> Program:
    return OutlineBranches()(DiscoverBranches()(program(source)).program).program


def lines(source: str) -> str:
    return "\n".join(line.strip() for line in source.strip().splitlines())


def test_every_branch_asks_the_step_modified_true() -> None:
    before = outlined()
    result = InsertGates()(before)
    assert result.modified
    assert text(result.program.graph) == lines("""
        z = mul.Tensor(x, c)
        t = permute(z, [1, 2, 0])
        m = mul.Tensor(t, mask)
        p = permute(m, [2, 0, 1])
        branch_0 = lazy_branch_0(lazy_step, p, w)
        getitem = branch_0[0]
        y = add.Tensor(x, getitem)
        return y
    """)
    assert [item.role for item in result.program.inputs] == [*(item.role for item in before.inputs), Role.LAZY_STEP]
    assert result.program.placeholders[-1].name == "lazy_step"


def test_a_program_without_bodies_modified_false() -> None:
    assert after(InsertGates(), SOURCE)[1] is False


def test_a_second_run_modified_false() -> None:
    assert not InsertGates()(InsertGates()(outlined()).program).modified


def test_the_program_before_keeps_its_bodies() -> None:
    before = outlined()
    InsertGates()(before)
    assert "branch_0 = branch_0(p, w)" in text(before.graph)
    assert before.graph_module.get_submodule("branch_0")


def test_a_step_that_computes_gives_what_was_there_before() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [[3, 5, 8], [3, 1, 8], [5, 1, 3], [8, 8]]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    step = Compute()
    before = outlined()
    (seen,) = InsertGates()(before).program.graph_module(*tensors, step)
    (expected,) = before.graph_module(*tensors)
    assert torch.equal(seen, expected)
    ((branch, inputs),) = step.seen
    assert branch.rows(inputs) == 3
    assert [entry.shape for entry in branch.entries(inputs)] == [(3, 5, 8)]


def test_single_rows_can_be_computed_wherever_the_batch_lies() -> None:
    source = """
        x: f32[B, N, 8]
        c: f32[B, 1, 8]
        w: param f32[8, 8]
        z = mul.Tensor(x, c)
        t = transpose.int(z, 0, 1)
        d = linear(t, w)
        v = transpose.int(d, 0, 1)
        y = add.Tensor(x, v)
        return y
    """
    gated = InsertGates()(outlined(source)).program
    branch = gated.graph_module.get_submodule("lazy_branch_0")
    assert isinstance(branch, LazyBranch)
    assert branch.row_axes == (1, None)  # t is float[N, B, 8], the weight has no rows
    inputs = [torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8)]
    assert branch.rows(inputs) == 3
    (some,), (all_rows,) = branch.compute(branch.picked(inputs, torch.tensor([2, 0]))), branch.compute(inputs)
    assert torch.equal(some, all_rows[:, [2, 0]])


def test_what_the_caller_receives_is_no_cache() -> None:
    source = """
        x: f32[B, N, 8]
        w: param f32[8, 8]
        d = linear(x, w)
        v = transpose.int(d, 1, 2)
        y = add.Tensor(x, d)
        return y, d, v
    """
    assert text(InsertGates()(outlined(source)).program.graph) == lines("""
        branch_0 = lazy_branch_0(lazy_step, x, w)
        getitem = branch_0[0]
        v = transpose.int(getitem, 1, 2)
        y = add.Tensor(x, getitem)
        clone_default = clone(getitem)
        clone_default_1 = clone(v)
        return y, clone_default, clone_default_1
    """)
