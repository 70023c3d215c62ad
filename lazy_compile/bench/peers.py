"""Peers' own packages against this one: same model, same noise, one counter of what really ran.

1. Every setting of every system runs on noise of its own, where plans are made too. What raises, or turns out to
   compute everything, is kept as such.
2. For each budget the best few settings are judged on other noise: several sets of images against the dense samples.
   A peer may spend a little more than the budget, since whole steps seldom fit; a plan what as many whole steps cost.
3. What is judged is timed in turn with the dense model, and asked whether a sample depends on the others of its batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lazy_compile.bench import peers_cache_dit, peers_diffusers, peers_plans
from lazy_compile.bench.macs import counted
from lazy_compile.bench.peer_task import Denoiser, PeerTask, Setting, System
from lazy_compile.bench.rows import RowFile
from lazy_compile.bench.timing import all_in_turn, one_thread
from lazy_compile.errors import one_line
from lazy_compile.progress import OnProgress, no_progress

logger = logging.getLogger("lazy_compile.bench")

Floats = npt.NDArray[np.float64]

SYSTEMS: tuple[System, ...] = (*peers_diffusers.SYSTEMS, *peers_cache_dit.SYSTEMS, *peers_plans.SYSTEMS)

DENSE = 0.999
"""A system that runs more of the dense model's MACs reused nothing."""


@dataclass(frozen=True)
class PeerSettings:
    """How much is measured.

    Attributes:
        steps: denoising steps T.
        budgets: shares of the dense model's MACs at which systems are compared.
        slack: what may be spent beyond a budget, so that whole steps fit: one of 20 is 5 points.
        search_samples, search_seed: the noise on which settings are chosen.
        plan_samples, plan_calls: images a trajectory of a search for schedules, and calls of the model of one without
            gradient: as many as 20 settings of a peer take.
        samples, seeds: sets of images on which they are judged.
        finalists: settings of a system that are judged for each budget; the best is shown.
        timed_samples, timings: images of a timed trajectory, and how often it is timed in turn with the dense model; 0
            for rows without a time.
        paired: how often a sample in a batch of 8 is compared with the same one alone.
        most_settings: of one system that are tried, spread over all of them; None for all.
    """

    steps: int = 20
    budgets: tuple[float, ...] = (0.7, 0.5, 0.35)
    slack: float = 0.015
    search_samples: int = 32
    search_seed: int = 0
    plan_samples: int = 24
    plan_calls: int = 400
    samples: int = 64
    seeds: tuple[int, ...] = (9_100_001, 9_100_002, 9_100_003)
    finalists: int = 1
    timed_samples: int = 16
    timings: int = 3
    paired: int = 2
    most_settings: int | None = None


@dataclass(frozen=True)
class SweptRow:
    """One setting on the noise on which settings are chosen; ``error`` says why there are no figures."""

    system: str
    setting: str
    compute: float | None
    rmse: float | None
    error: str | None


@dataclass(frozen=True)
class JudgedRow:
    """One setting on other noise.

    Attributes:
        budget: for which it was chosen.
        setting: as JSON.
        compute: MACs that ran, as a share of the dense model's.
        rmse, sets, median: to the dense samples: root of the mean over all images, of each set, of the median image.
        time: of a trajectory, as a share of the dense one's, timed in turn on one thread; ``times`` the least and most.
        batch: largest difference of a sample in a batch of 8 from the same sample alone.
    """

    system: str
    package: str
    budget: float
    setting: str
    compute: float
    rmse: float
    sets: list[float]
    median: float
    time: float | None
    times: list[float]
    batch: float | None


def measure(
    name: str,
    settings: PeerSettings,
    folder: Path | None = None,
    *,
    systems: Sequence[System] = SYSTEMS,
    on_progress: OnProgress = no_progress,
) -> Iterator[tuple[System, list[JudgedRow], str | None]]:
    """Each system in turn, with its rows on one model, or with why it has none.

    Args:
        name: of the model.
        settings: how much is measured.
        folder: what was measured is kept there, row by row, and not measured again.
        systems: that are compared.
        on_progress: see :mod:`lazy_compile.progress`.

    Raises:
        ConfigError: there is no such model.
    """
    with one_thread(), peers_diffusers.quietly():
        yield from PeerRun(name, settings, folder, on_progress).run(systems)


class PeerRun:
    """One model, the noise it starts from, and what the original makes of it."""

    def __init__(self, name: str, settings: PeerSettings, folder: Path | None, on_progress: OnProgress) -> None:
        self.settings, self.on_progress = settings, on_progress
        self.task = PeerTask.of(
            name, steps=settings.steps, budgets=settings.budgets, slack=settings.slack,
            search_samples=settings.search_samples, search_seed=settings.search_seed,
            plan_samples=settings.plan_samples, plan_calls=settings.plan_calls,
            folder=folder and folder / "plans",
        )  # fmt: skip
        path = folder and folder / f"{name}-{settings.steps}"
        key = ("system", "setting", "budget")
        self.swept = RowFile(path and path.with_suffix(".swept.json"), SweptRow, key[:2], self._identity(SWEEPING))
        self.judged = RowFile(path and path.with_suffix(".judged.json"), JudgedRow, key, self._identity(JUDGING))

    def _identity(self, fields: Sequence[str]) -> dict[str, Any]:
        """What the figures of a row depend on, as it is read back."""
        given = {"model": self.task.name, **{name: getattr(self.settings, name) for name in fields}}
        identity: dict[str, Any] = json.loads(json.dumps({**given, **versions("torch", "diffusers")}))
        return identity

    def run(self, systems: Sequence[System]) -> Iterator[tuple[System, list[JudgedRow], str | None]]:
        for place, system in enumerate(systems):
            self.on_progress(f"comparing peers, {self.task.name}", place, len(systems), system.name)
            swept = self._sweep(system)
            error = self._failure(swept)
            yield system, [] if error else self._judge_best(system, swept), error

    def _failure(self, swept: Sequence[SweptRow]) -> str | None:
        """Why a system has no row."""
        spent = [row.compute for row in swept if row.compute is not None]
        if not spent:
            return swept[0].error
        most = max(self.settings.budgets) + self.settings.slack
        return None if min(spent) <= most else f"spends {min(spent):.1%} of the MACs or more under every setting"

    # Sweeping -----------------------------------------------------------------------------------------------------

    def _sweep(self, system: System) -> list[SweptRow]:
        try:
            settings = evenly(system.settings(self.task), self.settings.most_settings)
        except Exception as error:  # a package that is missing, or whatever it raises
            return [SweptRow(system.name, "{}", None, None, _said(error))]
        rows: list[SweptRow] = []
        for setting in settings:
            text = json.dumps(dict(setting))
            row = self.swept.get(lambda: self._swept(system, setting, text), system=system.name, setting=text)  # noqa: B023
            rows.append(row)
            if len(rows) >= GIVE_UP and all(each.error for each in rows):
                break
        return rows

    def _swept(self, system: System, setting: Setting, text: str) -> SweptRow:
        task = self.task
        try:
            denoiser = system.denoiser(task, setting)
            images, macs = counted(lambda: task.sample(denoiser, task.search_samples, task.search_seed))
        except Exception as error:
            return SweptRow(system.name, text, None, None, _said(error))
        dense, dense_macs = self._searched
        compute = macs / dense_macs
        if compute > DENSE:
            return SweptRow(system.name, text, None, None, "computes everything: nothing was reused")
        rmse = float(np.sqrt(_errors(images, dense).mean()))
        if not np.isfinite(rmse):
            return SweptRow(system.name, text, None, None, "samples are not finite")
        return SweptRow(system.name, text, compute, rmse, None)

    @cached_property
    def _searched(self) -> tuple[Tensor, int]:
        return self._dense(self.settings.search_samples, self.settings.search_seed)

    @cached_property
    def _references(self) -> list[tuple[Tensor, int]]:
        return [self._dense(self.settings.samples, seed) for seed in self.settings.seeds]

    def _dense(self, samples: int, seed: int) -> tuple[Tensor, int]:
        return counted(lambda: self.task.sample(self.task.subject.model, samples, seed))

    # Judging ------------------------------------------------------------------------------------------------------

    def _judge_best(self, system: System, swept: Sequence[SweptRow]) -> list[JudgedRow]:
        found = []
        for budget in self.settings.budgets:
            for row in self._best(system, swept, budget):
                key = {"system": system.name, "setting": row.setting, "budget": budget}
                found.append(self.judged.get(lambda: self._judged(system, row.setting, budget), **key))  # noqa: B023
        return found

    def _best(self, system: System, swept: Sequence[SweptRow], budget: float) -> list[SweptRow]:
        most = budget + self.settings.slack
        affordable = [row for row in swept if row.compute is not None and row.compute <= most]
        return sorted(affordable, key=lambda row: row.rmse or 0.0)[: self.settings.finalists]

    def _judged(self, system: System, text: str, budget: float) -> JudgedRow:
        settings, setting = self.settings, json.loads(text)
        spent, errors = [], []
        for seed, (dense, dense_macs) in zip(settings.seeds, self._references, strict=True):
            denoiser = system.denoiser(self.task, setting)
            images, macs = counted(lambda: self.task.sample(denoiser, settings.samples, seed))  # noqa: B023
            spent.append(macs / dense_macs)
            errors.append(_errors(images, dense))
        every = np.concatenate(errors)
        ratios = self._times(lambda: system.denoiser(self.task, setting))
        return JudgedRow(
            system.name, system.package, budget, text, float(np.mean(spent)), float(np.sqrt(every.mean())),
            [float(np.sqrt(each.mean())) for each in errors], float(np.sqrt(np.median(every))),
            statistics.median(ratios) if ratios else None, [min(ratios), max(ratios)] if ratios else [],
            self._batch_difference(lambda: system.denoiser(self.task, setting)),
        )  # fmt: skip

    def _times(self, make: Callable[[], Denoiser]) -> list[float]:
        settings = self.settings
        if not settings.timings:
            return []
        made = iter([make() for _ in range(settings.timings + 1)])
        acts = {
            "dense": lambda step: self.task.sample(self.task.subject.model, settings.timed_samples, step),
            "other": lambda step: self.task.sample(next(made), settings.timed_samples, step),
        }
        taken = all_in_turn(acts, repeats=settings.timings, warm_steps=1, clock=time.process_time)
        return [other / dense for dense, other in zip(taken["dense"], taken["other"], strict=True)]

    def _batch_difference(self, make: Callable[[], Denoiser]) -> float | None:
        def first(samples: int, seed: int) -> Tensor:
            return self.task.sample(make(), samples, seed)[0]

        apart = [float((first(8, seed) - first(1, seed)).abs().max()) for seed in range(self.settings.paired)]
        return max(apart, default=None)


SWEEPING = ("steps", "search_samples", "search_seed")
JUDGING = ("steps", "samples", "seeds", "timed_samples", "timings", "paired")

GIVE_UP = 10
"""Settings that fail, none before them having worked, after which a system is not tried further."""


def evenly(settings: Sequence[Setting], most: int | None) -> Sequence[Setting]:
    """At most so many of them, spread over the list."""
    if most is None or len(settings) <= most:
        return settings
    return [settings[place * len(settings) // most] for place in range(most)]


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _errors(images: Tensor, dense: Tensor) -> Floats:
    """``float64[B]``: mean squared difference of each image."""
    errors: Floats = (images - dense).double().square().flatten(1).mean(1).numpy()
    return errors


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
