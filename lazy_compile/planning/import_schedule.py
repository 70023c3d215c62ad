"""Schedules from elsewhere: files that other caching tools write, and gates frozen to what they mostly decide."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazy_compile.digests import DIGEST, without_digest
from lazy_compile.errors import ArtifactError, ConfigError, one_line, shown
from lazy_compile.ir.branch import BranchKind, ResidualBranch
from lazy_compile.planning.patterns import few_patterns
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.stats import LazyStats
from lazy_compile.storage import load_json

_ATTENTION = frozenset({BranchKind.SELF_ATTENTION, BranchKind.JOINT_ATTENTION, BranchKind.PARALLEL})
_KINDS = {
    "attn": _ATTENTION, "attn1": _ATTENTION, "self_attn": _ATTENTION,
    "attn2": frozenset({BranchKind.CROSS_ATTENTION}), "cross_attn": frozenset({BranchKind.CROSS_ATTENTION}),
    "mlp": frozenset({BranchKind.MLP}), "ff": frozenset({BranchKind.MLP}),
}  # fmt: skip


def import_schedule(path: str | Path, branches: Sequence[ResidualBranch], steps: int) -> CacheSchedule:
    """Read a schedule whose format is known by its content: our own, SmoothCache's, routers, or a mask of steps.

    Raises:
        ArtifactError: the file cannot be read, or holds none of these.
        ConfigError: it is for another number of steps or branches.
    """
    values = load_json(path)
    try:
        schedule = _schedule_of(values, path, branches, steps)
    except (TypeError, ValueError, IndexError, OverflowError, KeyError, ConfigError) as error:
        raise ArtifactError(f"{path} is no schedule that is known here ({one_line(repr(error))})") from error
    if (schedule.steps, schedule.branches) != (steps, len(branches)):
        raise ConfigError(
            f"{path} is for {schedule.steps} steps and {schedule.branches} branches, this model takes {steps} and has "
            f"{len(branches)}; use as many steps as the file was made for"
        )
    return schedule


def _schedule_of(values: Any, path: str | Path, branches: Sequence[ResidualBranch], steps: int) -> CacheSchedule:
    """By what the file holds."""
    if isinstance(values, Mapping) and "should_compute" in values:
        return CacheSchedule.from_json(without_digest(values, path) if DIGEST in values else values)
    if isinstance(values, Mapping) and "routers" in values:
        return from_routers(values["routers"], steps)
    if isinstance(values, Mapping) and "steps_mask" in values:
        return from_steps_mask(values["steps_mask"], branches)
    if isinstance(values, Mapping) and values and all(isinstance(row, list) for row in values.values()):
        return from_smoothcache(values, branches)
    raise ArtifactError(
        f"{path} is no schedule that is known here; expected an object with should_compute, routers or steps_mask, "
        "or one list of 0 and 1 for each component, as SmoothCache writes it"
    )


def from_smoothcache(components: Mapping[str, Sequence[int]], branches: Sequence[ResidualBranch]) -> CacheSchedule:
    """SmoothCache's files: for each component, ``"attn"`` or ``"mlp-3"`` for that of the fourth block, 1 computes.

    A branch that the file does not name computes at every step. Components are matched to branches by their kind.

    Raises:
        ArtifactError: a component is not known, has no branch, or is of another length.
    """
    lengths = {len(row) for row in components.values()}
    if len(lengths) != 1:
        raise ArtifactError(f"the components have {shown(sorted(lengths))} steps; expected one number of steps for all")
    table = np.ones((lengths.pop(), len(branches)), dtype=bool)
    for name, row in components.items():
        base, _, position = re.sub(r"[-_.](?=\d+$)", "-", name).partition("-")
        if base not in _KINDS or not np.isin(row, (0, 1)).all():
            raise ArtifactError(
                f"component {shown(name)} is not known; expected 0 and 1 for one of {', '.join(_KINDS)}"
            )
        chosen = [branch.index for branch in branches if branch.kind in _KINDS[base]]
        chosen = chosen[int(position) : int(position) + 1] if position else chosen
        if not chosen:
            raise ArtifactError(f"component {shown(name)} has no branch in this model; was the schedule made for it?")
        table[:, chosen] = np.array(row, dtype=bool)[:, None]
    return CacheSchedule(table)


def from_routers(scores: Sequence[Sequence[float]], steps: int, threshold: float = 0.5) -> CacheSchedule:
    """Learning-to-Cache's routers: ``scores[row][branch]`` after the sigmoid; above the threshold a branch computes.

    With half as many rows as steps, as that method trains them, they belong to the second step of every pair, and the
    first computes everything.

    Raises:
        ArtifactError: the scores are no table with a row for every step, or for every second one.
    """
    try:
        rows = np.array(scores, dtype=np.float64)
        if not np.isfinite(rows).all() or not ((rows >= 0) & (rows <= 1)).all():
            raise ValueError("a score is not between 0 and 1")
        if rows.ndim != 2 or len(rows) not in (steps, steps // 2):
            raise ValueError(f"the shape is {rows.shape}")
    except (ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(
            f"these are no routers for {steps} steps ({shown(error)}); expected {steps} or {steps // 2} rows"
        ) from error
    table = np.ones((steps, rows.shape[1]), dtype=bool)
    if len(rows) == steps:
        table[1:] = rows[1:] > threshold
    else:
        table[1 : 2 * len(rows) : 2] = rows > threshold
    return CacheSchedule(table)


def from_steps_mask(mask: Sequence[int], branches: Sequence[ResidualBranch]) -> CacheSchedule:
    """cache-dit's ``steps_mask``: one number for each step, 1 computes everything.

    Raises:
        ArtifactError: it is not made of 0 and 1.
    """
    if not isinstance(mask, Sequence) or not len(mask) or not np.isin(mask, (0, 1)).all():
        raise ArtifactError(f"the steps_mask is {shown(mask)}; expected a list of 0 and 1, one for each step")
    return CacheSchedule(np.repeat(np.array(mask, dtype=bool)[:, None], len(branches), axis=1))


def freeze(stats: LazyStats, *, max_patterns: int | None = None) -> CacheSchedule:
    """The schedule of what learned gates decided for most rows, from the statistics of trajectories under them.

    Args:
        stats: what was decided.
        max_patterns: how many distinct rows it may have, see :func:`~lazy_compile.planning.patterns.few_patterns`;
            None for any number.

    Raises:
        ConfigError: no trajectory was run; or one pattern cannot hold what was decided.
    """
    if not len(stats.evaluated):
        raise ConfigError("these statistics are empty; run a trajectory under the gates first")
    schedule = CacheSchedule(stats.reuse_table <= 0.5)
    return schedule if max_patterns is None else few_patterns(schedule, max_patterns, stats.branch_macs)
