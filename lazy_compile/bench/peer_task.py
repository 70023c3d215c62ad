"""A trained model to run peers on: its noise, how far each step is, and which whole steps a budget pays for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazy_compile.bench.tasks.registry import SUBJECTS, Subject
from lazy_compile.compiler import transform
from lazy_compile.errors import ConfigError
from lazy_compile.runtime.module import LazyModule

Setting = Mapping[str, Any]
"""Values by name, as a package's configuration calls them."""

Denoiser = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class PeerTask:
    """A model, and how it is sampled.

    Attributes:
        name: as on the command line.
        subject: the model, its samplers and its judge.
        steps: denoising steps T.
        budgets: shares of the dense model's MACs at which systems are compared.
        slack: what may be spent beyond a budget, so that whole steps fit.
        search_samples, search_seed: the noise on which settings are chosen.
        plan_samples, plan_calls: images a trajectory of a search for schedules, on noise from the same seed, and calls
            of the model of one without gradient.
        folder: where plans are kept; None makes them anew.
    """

    name: str
    subject: Subject
    steps: int
    budgets: tuple[float, ...]
    slack: float
    search_samples: int
    search_seed: int
    plan_samples: int
    plan_calls: int
    folder: Path | None = None

    @classmethod
    def of(cls, name: str, **given: Any) -> PeerTask:
        """
        Raises:
            ConfigError: there is no such model.
        """
        if name not in SUBJECTS:
            raise ConfigError(f"there is no model {name!r} to measure; expected one of {', '.join(SUBJECTS)}")
        return cls(name, SUBJECTS[name](), **given)

    def sample(self, denoiser: Denoiser, samples: int, seed: int) -> Tensor:
        with torch.no_grad():
            return self.subject.sampler(self.steps, samples)(denoiser, seed)  # type: ignore[arg-type]

    @cached_property
    def lazy(self) -> LazyModule:
        """The model with gated branches; its graph says what a whole step can save."""
        lazy: LazyModule = transform(self.subject.model, self.subject.example)
        return lazy

    @cached_property
    def _share(self) -> float:
        """Of the MACs, what whole steps save."""
        return sum(branch.macs for branch in self.lazy.branches) / self.lazy.graph.total_macs

    def _whole_steps(self, budget: float) -> int:
        return int(self.steps * (1 - (1 - budget - self.slack) / self._share) + 1e-9)

    def allowance(self, budget: float) -> float:
        """What as many whole steps cost as a budget and its slack pay for: what a plan may spend."""
        return 1 - self._share * (1 - self._whole_steps(budget) / self.steps)

    def counts(self) -> set[int]:
        """How many whole steps compute at each budget: as many as it pays for, and one less."""
        most = map(self._whole_steps, self.budgets)
        return {count - fewer for count in most for fewer in (0, 1) if count - fewer > 1}

    def families(self) -> Iterator[tuple[int, int, list[int]]]:
        """``(warm-up, interval, steps that compute)`` of "every n-th step after a warm-up" near a budget, each choice
        of steps once."""
        seen: set[tuple[int, ...]] = set()
        for warmup in range(1, self.steps // 2 + 1):
            for interval in range(2, 7):
                chosen = [step for step in range(self.steps) if step < warmup or (step - warmup - 1) % interval == 0]
                if len(chosen) in self.counts() and tuple(chosen) not in seen:
                    seen.add(tuple(chosen))
                    yield warmup, interval, chosen


@dataclass(frozen=True)
class System:
    """One way of spending less.

    Attributes:
        name: shown in tables.
        package: whose code runs.
        settings: what is swept.
        denoiser: a fresh denoiser for one trajectory under one of these; raises what its package raises.
    """

    name: str
    package: str
    settings: Callable[[PeerTask], Sequence[Setting]]
    denoiser: Callable[[PeerTask, Setting], Denoiser]

    @property
    def ours(self) -> bool:
        return self.package == "lazy_compile"


MOST_SETTINGS = 20
"""Settings of a grid that are tried."""


def grid(**values: Sequence[Any]) -> list[Setting]:
    """All combinations, or :data:`MOST_SETTINGS` of them, drawn the same way every time."""
    return drawn([dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())])


def drawn(settings: list[Setting]) -> list[Setting]:
    return settings if len(settings) <= MOST_SETTINGS else random.Random(0).sample(settings, MOST_SETTINGS)
