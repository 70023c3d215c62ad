"""This package among its peers: plans of both planners, every n-th step with our extrapolation, and the presets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from lazy_compile.bench.peer_task import Denoiser, PeerTask, Setting, System
from lazy_compile.compiler import transform
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import plan
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


def _budgets(granularity: str, with_gradient: bool) -> Any:
    def settings(task: PeerTask) -> Sequence[Setting]:
        shared = {"granularity": granularity, "order": 2, "images": task.plan_samples}
        if not with_gradient:
            shared["calls"] = task.plan_calls
        return [{"budget": each, "compute_ratio": round(task.allowance(each), 4), **shared} for each in task.budgets]

    return settings


def _planned(task: PeerTask, setting: Setting) -> Denoiser:
    lazy = _lazy(task, setting["granularity"], setting["order"])
    lazy.policy = Scheduled(_schedule(task, setting))
    return lazy


def _schedule(task: PeerTask, setting: Setting) -> CacheSchedule:
    """Made once, from the seed of the noise on which peers are swept, and kept."""
    name = "-".join(map(str, [task.name, task.steps, *setting.values()]))
    folder = task.folder and task.folder / name
    if folder and (folder / "schedule.json").exists():
        return CacheSchedule.load(folder / "schedule.json")
    lazy = _lazy(task, setting["granularity"], setting["order"])
    spend = Budget(compute_ratio=setting["compute_ratio"] + 1e-4)
    found = plan(
        lazy, task.subject.sampler(task.steps, setting["images"]), spend,
        options=SearchOptions(rounds=ROUNDS), calls=setting.get("calls"),
        seed=task.search_seed, checkpoint=folder and folder / "checkpoint",
    )  # fmt: skip
    if folder:
        save_json(folder / "schedule.json", found.to_json())
    return found


def _every_nth_settings(task: PeerTask) -> Sequence[Setting]:
    return [
        {"warmup": warmup, "interval": interval, "order": order}
        for warmup, interval, _ in task.families()
        for order in (2, 3)
    ]


def _every_nth(task: PeerTask, setting: Setting) -> Denoiser:
    """The steps that TaylorSeer of diffusers computes, as a schedule."""
    known = {(warmup, interval): steps for warmup, interval, steps in task.families()}
    lazy = _lazy(task, "branch", setting["order"])
    table = np.zeros((task.steps, len(lazy.branches)), dtype=bool)
    table[known[setting["warmup"], setting["interval"]]] = True
    lazy.policy = Scheduled(CacheSchedule(table))
    return lazy


def _preset_settings(task: PeerTask) -> Sequence[Setting]:
    return [{"policy": name} for name in PRESETS]


def _preset(task: PeerTask, setting: Setting) -> Denoiser:
    lazy: LazyModule = transform(task.subject.model, task.subject.example, policy=setting["policy"])
    return lazy


SYSTEMS = (
    System("plan", "lazy_compile", _budgets("branch", True), _planned),
    System("plan, spans", "lazy_compile", _budgets("block", True), _planned),
    System("plan without gradient", "lazy_compile", _budgets("branch", False), _planned),
    System("every n-th step", "lazy_compile", _every_nth_settings, _every_nth),
    System("preset", "lazy_compile", _preset_settings, _preset),
)
