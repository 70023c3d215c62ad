"""What each granularity of a captured model would take and leave, before one is chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lazy_compile import pass_pipelines
from lazy_compile.config import Granularity, LazyConfig, ReuseArm
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.program import Program
from lazy_compile.runtime.cache_format import CacheFormat
from lazy_compile.runtime.lazy_graph import LazyGraph

GRANULARITIES: tuple[Granularity, ...] = ("branch", "block", 8, 4, 2, "model")


@dataclass(frozen=True)
class GranularityRow:
    """A model at one granularity.

    Attributes:
        granularity: see :class:`~lazy_compile.config.LazyConfig`.
        decisions: branches or spans.
        output_bytes: of one kept value of all of them, at the captured sizes.
        always_on: share of the model's multiply-accumulates that no reuse saves.
        note: why it is not what was asked for; empty if it is.
    """

    granularity: Granularity
    decisions: int
    output_bytes: int
    always_on: float
    note: str = ""


def granularity_rows(graph: LazyGraph, wanted: Sequence[Granularity] = GRANULARITIES) -> Iterator[GranularityRow]:
    """One row for each granularity that gives another number of decisions than those before."""
    discovered = pass_pipelines.discovering(graph.config).run(graph.captured.program)
    seen: set[int] = set()
    for granularity in wanted:
        row = _row(
            pass_pipelines.spanning(granularity, graph.config.probe).run(discovered), granularity, graph.total_macs
        )
        if row.decisions not in seen:
            seen.add(row.decisions)
            yield row


def cache_bytes(branches: Sequence[ResidualBranch], config: LazyConfig) -> int:
    """What the caches of the rows of one call take, at the captured sizes."""
    form = CacheFormat.of(config)
    return config.values_kept * sum(form.bytes(branch) for branch in branches)


def fitting(graph: LazyGraph, config: LazyConfig, *, any_granularity: bool) -> LazyConfig:
    """The options whose caches take at most ``config.max_cache_bytes``, as near to ``config`` as that allows.

    1. The type of the caches is given up first (bfloat16, where outputs are wider), since that costs least; then the
       granularity, from branches to the whole stack; then the order of reuse.
    2. ``any_granularity=False`` keeps that of ``config``: the policy was made for its branches.

    Raises:
        ConfigError: nothing fits; how much the least takes.
    """
    most = config.max_cache_bytes
    assert most is not None
    discovered = pass_pipelines.discovering(config).run(graph.captured.program)
    granularities = [config.granularity]
    if any_granularity:
        known = config.granularity in GRANULARITIES
        granularities += GRANULARITIES[GRANULARITIES.index(config.granularity) + 1 :] if known else ("model",)
    branches = {
        granularity: pass_pipelines.spanning(granularity, config.probe if granularity != "branch" else None)
        .run(discovered)
        .branches
        for granularity in granularities
    }
    dtypes = dict.fromkeys([config.cache_dtype, config.cache_dtype or "bfloat16"])
    arms: dict[ReuseArm, None] = dict.fromkeys([config.reuse, "linear" if config.reuse != "last" else "last", "last"])
    least = math.inf
    for arm, granularity, dtype in itertools.product(arms, granularities, dtypes):
        probe = None if granularity == "branch" else config.probe
        candidate = replace(config, reuse=arm, granularity=granularity, probe=probe, cache_dtype=dtype)
        taken = cache_bytes(branches[granularity], candidate)
        if taken <= most:
            return candidate
        least = min(least, taken)
    raise ConfigError(
        f"the caches of one call take {least / 2**20:.3g} MiB at least, and max_cache_bytes is {most / 2**20:.3g} MiB; "
        'allow more, take a smaller batch, or keep them elsewhere with cache_device="cpu"'
    )


def changes(before: LazyConfig, after: LazyConfig) -> str:
    """What :func:`fitting` chose, in words."""
    chosen = [
        f"{name}={getattr(after, name)!r}"
        for name in ("cache_dtype", "granularity", "reuse")
        if getattr(after, name) != getattr(before, name)
    ]
    return f"{', '.join(chosen)} to keep to max_cache_bytes={after.max_cache_bytes}"


def _row(program: Program, granularity: Granularity, total_macs: int) -> GranularityRow:
    branches = program.branches
    return GranularityRow(
        granularity,
        len(branches),
        sum(branch.output_bytes for branch in branches),
        1 - sum(branch.macs for branch in branches) / total_macs,
        "; ".join(refusal.reason for refusal in program.refusals if not refusal.node),
    )
