"""The order of the passes. No other module lists them.

captured --gating--> gated --lifting--> lifted --lowering or scheduled--> flat, ready to be exported
"""

from __future__ import annotations

from collections.abc import Sequence

from lazy_compile.config import Granularity, LazyConfig, Probe
from lazy_compile.ir.pass_manager import PassManager
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


def hoisting(invariants: frozenset[str] = frozenset()) -> PassManager:
    """From a captured program to one in normal form, whose prologue computes what ``invariants`` decide."""
    return PassManager(
        [
            Canonicalize(),
            JoinSlices(),
            MergeRepeats(),  # after JoinSlices, which leaves equal nodes behind
            HoistStepInvariants(invariants),
        ]
    )


def discovering(config: LazyConfig, invariants: frozenset[str] = frozenset()) -> PassManager:
    """From a captured program to one whose branches are known."""
    return PassManager([*hoisting(invariants).passes, DiscoverBranches(conv_branches=config.conv_branches)])


def spanning(granularity: Granularity, probe: Probe | None) -> PassManager:
    """From branches to spans of several, which are decided and cached as one."""
    return PassManager([MergeSpans(granularity, probe)])


def gating(config: LazyConfig, invariants: frozenset[str] = frozenset()) -> PassManager:
    """From a captured program to a gated one, whose branches are submodules that compute or reuse."""
    return PassManager(
        [
            *discovering(config, invariants).passes,
            *spanning(config.granularity, config.probe).passes,
            OutlineBranches(),
            InsertGates(),
        ]
    )


def lifting(lift: LiftCacheSlots) -> PassManager:
    """From a gated program to one that takes cache slots and returns them."""
    return PassManager([lift])


def lowering() -> PassManager:
    """From a lifted program to a flat one, in which selects stand for the branches."""
    return PassManager([LowerToSelect(), MergeGroups(), SplitComplex()])


def scheduled(should_compute: Sequence[bool]) -> PassManager:
    """From a lifted program to a flat one without choices: the branches of one row of a schedule."""
    return PassManager([ApplySchedule(tuple(should_compute)), SplitComplex()])


def prologue() -> PassManager:
    """From the prologue of a program to what ONNX can express."""
    return PassManager([SplitComplex()])
