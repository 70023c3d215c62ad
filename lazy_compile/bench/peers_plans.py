"""This package among its peers: plans of both planners, and the presets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lazy_compile.bench.peer_task import Denoiser, PeerTask, Setting, System
from lazy_compile.compiler import transform
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import CALLS, plan
from lazy_compile.planning.search import SearchOptions
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.presets import PRESETS
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import save_json

ROUNDS = 3
"""Of the search with gradient."""


@cache
def _lazy(task: PeerTask, granularity: str, order: int) -> LazyModule:
    lazy: LazyModule = transform(
        task.subject.model, task.subject.example, granularity=granularity, reuse="taylor", order=order
    )
    return lazy


def _budgets(granularity: str) -> Any:
    def settings(task: PeerTask) -> Sequence[Setting]:
        return [{"budget": budget, "granularity": granularity, "order": 2} for budget in task.budgets]

    return settings


def _planned(with_gradient: bool) -> Any:
    def denoiser(task: PeerTask, setting: Setting) -> Denoiser:
        lazy = _lazy(task, setting["granularity"], setting["order"])
        lazy.policy = Scheduled(_schedule(task, with_gradient, **setting))
        return lazy

    return denoiser


def _schedule(task: PeerTask, with_gradient: bool, budget: float, granularity: str, order: int) -> CacheSchedule:
    """Made once on the noise on which peers are swept, and kept."""
    kind = "gradient" if with_gradient else "calls"
    folder = task.folder and task.folder / f"{task.name}-{task.steps}-{kind}-{granularity}-{order}-{budget}"
    if folder and (folder / "schedule.json").exists():
        return CacheSchedule.load(folder / "schedule.json")
    spend = Budget(compute_ratio=task.allowance(budget) + 1e-6)
    found = plan(
        _lazy(task, granularity, order), task.subject.sampler(task.steps, task.search_samples), spend,
        options=SearchOptions(rounds=ROUNDS), calls=None if with_gradient else CALLS * task.steps // 20,
        seed=task.search_seed, checkpoint=folder and folder / "checkpoint",
    )  # fmt: skip
    if folder:
        save_json(folder / "schedule.json", found.to_json())
    return found


def _preset_settings(task: PeerTask) -> Sequence[Setting]:
    return [{"policy": name} for name in PRESETS]


def _preset(task: PeerTask, setting: Setting) -> Denoiser:
    lazy: LazyModule = transform(task.subject.model, task.subject.example, policy=setting["policy"])
    return lazy


SYSTEMS = (
    System("plan", "lazy_compile", _budgets("branch"), _planned(True)),
    System("plan, spans", "lazy_compile", _budgets("block"), _planned(True)),
    System("plan without gradient", "lazy_compile", _budgets("branch"), _planned(False)),
    System("preset", "lazy_compile", _preset_settings, _preset),
)
