"""What something is, in a few lines."""

from __future__ import annotations

from typing import Any

from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.diffusers_pipeline import is_pipeline, lazy_denoisers
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.stats import LazyStats


def summary(thing: Any) -> str:
    """A lazy model, pipeline, exported model, schedule or policy in words: branches, decisions, what was saved.

    Raises:
        ConfigError: it is none of these.
    """
    if is_pipeline(thing):
        models = lazy_denoisers(thing)
        lines = [f"{type(thing).__name__} with {len(models)} lazy model(s)"]
        return "\n".join([*lines, *(_indented(name, summary(lazy)) for name, lazy in models.items())])
    if isinstance(thing, LazyModule):
        return "\n".join(_of_model(thing))
    if isinstance(thing, EngineDenoiser):
        name = thing.runner.metadata.model
        lines = [f"exported {name}: {len(thing.branches)} branches", f"policy: {thing.policy.describe()}"]
        return "\n".join([*lines, *_saved(thing.stats)])
    if isinstance(thing, CacheSchedule):
        return "\n".join(_of_schedule(thing))
    if isinstance(thing, Policy):
        return thing.describe()
    raise ConfigError(
        "summary() takes a lazy model or pipeline, an exported model, a schedule or a policy; seen "
        f"{type(thing).__name__}"
    )


def _of_model(lazy: LazyModule) -> list[str]:
    name = type(lazy.original).__name__
    if not lazy.is_captured:
        return [f"lazy {name}, captured at its first call", f"policy: {lazy.policy.describe()}"]
    kinds = [branch.kind.value for branch in lazy.branches]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    share = sum(branch.macs for branch in lazy.branches) / lazy.graph.total_macs
    refused = f", {len(lazy.refusals)} candidates refused" if lazy.refusals else ""
    return [
        f"lazy {name}: {len(lazy.branches)} branches ({counted}) with {share:.0%} of the MACs{refused}",
        f"policy: {lazy.policy.describe()}",
        f"caches of a stream: {lazy.expected_cache_bytes / 1e6:.3g} MB at the captured sizes, "
        f'reuse="{lazy.lazy_config.reuse}"',
        *_saved(lazy.stats),
    ]


def _saved(stats: LazyStats) -> list[str]:
    if not stats.calls:
        return ["not called since its statistics were reset"]
    saved = f"reused {stats.lazy_ratio:.0%} of the branch evaluations, spent {stats.compute_ratio:.0%} of the MACs"
    return [f"{stats.calls} calls: {saved}"]


def _of_schedule(schedule: CacheSchedule) -> list[str]:
    """One line a step where branches differ: how many compute."""
    counts = schedule.should_compute.sum(axis=1).tolist()
    return [
        f"{schedule.steps} steps of {schedule.branches} branches; {schedule.lazy_ratio:.0%} reused"
        + ("" if schedule.slopes is None else ", with slopes"),
        f"branches that compute at each step: {' '.join(map(str, counts))}",
    ]


def _indented(name: str, text: str) -> str:
    return "\n".join([f"  {name}", *(f"    {line}" for line in text.splitlines())])
