"""What each granularity of a captured model would take and leave, before one is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazy_compile import pipelines
from lazy_compile.config import Granularity
from lazy_compile.ir.program import Program
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
    discovered = pipelines.discovering(graph.config).run(graph.captured.program)
    seen: set[int] = set()
    for granularity in wanted:
        row = _row(pipelines.spanning(granularity, graph.config.probe).run(discovered), granularity, graph.total_macs)
        if row.decisions not in seen:
            seen.add(row.decisions)
            yield row


def _row(program: Program, granularity: Granularity, total_macs: int) -> GranularityRow:
    branches = program.branches
    return GranularityRow(
        granularity,
        len(branches),
        sum(branch.output_bytes for branch in branches),
        1 - sum(branch.macs for branch in branches) / total_macs,
        "; ".join(refusal.reason for refusal in program.refusals if not refusal.node),
    )
