"""What every pass promises, on every toy model; and that the manager catches one that breaks its promise."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lazy_compile.passes
from lazy_compile.errors import PassError
from lazy_compile.ir.lazy_branch import TAG, LazyBranch
from lazy_compile.ir.pass_manager import GraphPass, PassManager
from lazy_compile.ir.program import Program, Role, module_state
from lazy_compile.passes.apply_schedule import ApplySchedule
from lazy_compile.passes.canonicalize import Canonicalize
from lazy_compile.passes.discover_branches import DiscoverBranches
from lazy_compile.passes.hoist_step_invariants import HoistStepInvariants
from lazy_compile.passes.insert_gates import InsertGates
from lazy_compile.passes.join_slices import JoinSlices
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from lazy_compile.passes.lower_to_select import LowerToSelect
from lazy_compile.passes.merge_groups import MergeGroups
from lazy_compile.passes.merge_repeats import MergeRepeats
from lazy_compile.passes.merge_spans import MergeSpans
from lazy_compile.passes.outline_branches import OutlineBranches
from lazy_compile.passes.split_complex import SplitComplex
from support.graph_text import program
from support.slow import slow_but
from support.toy_models import TOYS, call

Captured = Callable[[str], Program]

STAYS = frozenset({"text", "y", "guidance"})

GATING = [
    *[Canonicalize(), JoinSlices(), MergeRepeats(), HoistStepInvariants(STAYS)],
    *[DiscoverBranches(), OutlineBranches(), InsertGates()],
]

SPANNING = [*GATING[:-2], MergeSpans(2), *GATING[-2:]]


class Compute:
    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return branch.compute(inputs)


def lowerings(branches: int) -> list[list[GraphPass]]:
    decisions = tuple(index % 2 == 0 for index in range(branches))
    return [
        [LiftCacheSlots("linear", leaders=(0,) * branches), LowerToSelect(), MergeGroups(), SplitComplex()],
        [LiftCacheSlots("last"), ApplySchedule(decisions)],
        [LiftCacheSlots("taylor"), LowerToSelect()],
    ]


def snapshot(program: Program) -> tuple[Any, ...]:
    """Everything that a pass could change: the text, what each node is tagged with, modules, and the records."""
    tags = [(node.name, node.meta.get(TAG), str(node.meta.get("val"))) for node in program.graph.nodes]
    modules = [(name, id(module)) for name, module in program.graph_module.named_modules() if name]
    records = (program.inputs, program.branches, program.refusals, dict(program.output_constants))
    prologue = program.prologue and str(program.prologue.graph)
    return str(program.graph), prologue, tags, modules, records, list(program.constants), program.state_outputs


def run(program: Program, toy: str) -> list[Tensor]:
    values = program.bind(module_state(TOYS[toy].model()), list(call(TOYS[toy], 3).values()))
    step = [Compute()] if program.inputs[-1].role is Role.LAZY_STEP else []
    with torch.no_grad():
        return list(program.graph_module(*values, *step))


def hold_to_contract(graph_pass: GraphPass, before: Program) -> Program:
    """Run once and again; returns the new program."""
    was = snapshot(before)
    result = graph_pass(before)
    assert snapshot(before) == was, "it edited its input"
    assert result.modified == (snapshot(result.program) != was), "modified does not say the truth"
    result.program.graph.lint()
    assert len(result.program.inputs) == len(result.program.placeholders)
    again = graph_pass(result.program)
    assert not again.modified, "a second run changes something"
    assert snapshot(again.program) == snapshot(result.program)
    return result.program


EVERY_RUN = ["mmdit", "uvit", "hand_written", "windowed"]


@pytest.mark.parametrize("toy", slow_but(EVERY_RUN, TOYS))
def test_every_pass_keeps_its_contract(toy: str, captured: Captured) -> None:
    check_passes(GATING, toy, captured)


@pytest.mark.parametrize("toy", slow_but(["parallel", "windowed"], ["mmdit", "parallel", "uvit", "windowed"]))
def test_passes_keep_their_contract_on_spans(toy: str, captured: Captured) -> None:
    check_passes(SPANNING, toy, captured)


def check_passes(gating: Sequence[GraphPass], toy: str, captured: Captured) -> None:
    gated = captured(toy)
    expected = run(gated, toy)
    for graph_pass in gating:
        gated = hold_to_contract(graph_pass, gated)
        for seen, wanted in zip(run(gated, toy), expected, strict=True):
            assert torch.equal(seen, wanted), f"{graph_pass.name} changed the numerics"
    for passes in lowerings(len(gated.branches)):
        lowered = gated
        for graph_pass in passes:
            lowered = hold_to_contract(graph_pass, lowered)


def test_every_pass_there_is_takes_part() -> None:
    taking_part = {type(item) for item in [*SPANNING, *(item for passes in lowerings(1) for item in passes)]}
    modules = [
        import_module(f"lazy_compile.passes.{item.name}") for item in pkgutil.iter_modules(lazy_compile.passes.__path__)
    ]
    there_are = {
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, GraphPass) and member.__module__ == module.__name__
    }
    assert taking_part == there_are
    for member in there_are:
        assert is_dataclass(member)
        assert member.__dataclass_params__.frozen
        assert "::" in inspect.getdoc(member), f"{member.__name__} does not show its graph before and after"


# The manager ------------------------------------------------------------------------------------------------------


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


SOURCE = "x: f32[B, N, 8]\n a = cos(x)\n b = neg(a)\n return b"


@dataclass(frozen=True)
class ChangesInSecret(GraphPass):
    def apply(self, program: Program) -> bool:
        calls(program)[0].target = torch.ops.aten.sin.default
        return False


@dataclass(frozen=True)
class Boasts(GraphPass):
    def apply(self, program: Program) -> bool:
        return True


@dataclass(frozen=True)
class Refuses(GraphPass):
    def apply(self, program: Program) -> bool:
        program.refusals = ("something",)
        return False


@dataclass(frozen=True)
class SwapsModules(GraphPass):
    def apply(self, program: Program) -> bool:
        program.graph_module.body = torch.nn.Sequential()
        return False


@dataclass(frozen=True)
class Disorders(GraphPass):
    def apply(self, program: Program) -> bool:
        first, second = calls(program)
        second.append(first)
        return True


@dataclass(frozen=True)
class ForgetsAnInput(GraphPass):
    def apply(self, program: Program) -> bool:
        with program.graph.inserting_before(program.placeholders[0]):
            program.graph.placeholder("extra")
        return True


@pytest.mark.parametrize(
    ("graph_pass", "message"),
    [
        (ChangesInSecret(), "pass test_contract changed the program but reported modified=False"),
        (Boasts(), "pass test_contract left the program as it was but reported modified=True"),
        (Refuses(), "pass test_contract changed the program but reported modified=False"),
        (Disorders(), "pass test_contract left a malformed graph: "),
        (ForgetsAnInput(), "pass test_contract: 1 inputs described, 2 exist"),
    ],
)
def test_a_pass_that_breaks_its_promise_is_caught(graph_pass: GraphPass, message: str) -> None:
    with pytest.raises(PassError) as caught:
        graph_pass(program(SOURCE))
    assert str(caught.value).startswith(message)


def test_a_swapped_submodule_counts_as_a_change() -> None:
    source = program(SOURCE)
    source.graph_module.add_submodule("body", torch.nn.Sequential())
    with source.graph.inserting_before(source.graph.output_node()):
        source.graph.call_module("body", (source.placeholders[0],))
    with pytest.raises(PassError, match="changed the program but reported modified=False"):
        SwapsModules()(source)


def test_the_manager_stops_behind_the_pass_that_is_asked_for() -> None:
    manager = PassManager(GATING)
    source = program("x: f32[B, N, 8]\n w: param f32[8, 8]\n d = linear(x, w)\n y = add.Tensor(x, d)\n return y")
    tagged = manager.run(source, until="discover_branches")
    assert len(tagged.branches) == 1
    assert not list(tagged.graph.find_nodes(op="call_module"))
    assert list(manager.run(source).graph.find_nodes(op="call_module"))


def test_an_unknown_pass_is_named_with_those_there_are() -> None:
    with pytest.raises(PassError) as caught:
        PassManager(GATING).run(program(SOURCE), until="gates")
    assert str(caught.value) == (
        "there is no pass 'gates'; the passes are canonicalize, join_slices, merge_repeats, "
        "hoist_step_invariants, discover_branches, outline_branches, insert_gates"
    )


def test_a_copy_of_a_program_can_be_edited_without_the_original() -> None:
    source = program(SOURCE)
    copy = source.copy()
    node, original = calls(copy)[0], calls(source)[0]
    node.target = torch.ops.aten.sin.default
    node.meta[TAG] = 3
    assert original.target is torch.ops.aten.cos.default
    assert TAG not in original.meta
    assert isinstance(copy.graph_module, fx.GraphModule)
