"""Rules that decide at run time whether a branch computes or reuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from lazy_compile.errors import ConfigError, one_line, shown
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.policies.gate_table import GateRow, GateTable
from lazy_compile.policies.schedule import CacheSchedule, StepTable


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class GateQuery:
    """The question that a branch puts to the policy.

    Attributes:
        branch: who asks.
        entries: its modulated inputs.
        step: index of the sampler step in this trajectory, from 0.
        timestep: the model's time input, or the step index where the model has none.
        before: that of the step before; None at the first.
        memory: a dictionary of this stream, emptied at every new trajectory, for rules that accumulate.
        average: the mean of a tensor over the processes that hold the tokens of this call; by itself where it is one.
    """

    branch: ResidualBranch
    entries: Sequence[Tensor]
    step: int
    timestep: float
    before: float | None
    memory: dict[str, object]
    average: Callable[[Tensor], Tensor] = _alone


Decisions = bool | Sequence[bool | None] | None
"""What a host knows before a step: True computes, False reuses. One value for all branches, or one for each, in which
None leaves a branch to its gate; None alone: nothing is known before the step."""

GATES = "gates"
"""Where a host that reads gates keeps in ``memory`` what they said at the step before: ``list[bool]``, one a branch."""

_DECIDED = "decided"


class Policy:
    """Decides; the runtime still computes where nothing is cached, in the warm-up, and at ``max_reuse_age``.

    A subclass overrides :meth:`decisions` if it knows before a step what the branches do, and can then be followed by
    exported models too; or :meth:`should_compute` if it looks at the activations, and then runs in PyTorch.

    Files name a class by its ``kind``: ``class Mine(Policy, kind="mine")``; without one it is ``module:Class``. What a
    file names is found among the classes that are defined, and nothing is ever imported for it.

    Attributes:
        kind: how files name this class.
        per_branch: whether the policy belongs to the branches that it was made for, so that a call of the model with
            other branches computes those. False if it treats all branches alike, whatever their number.
    """

    kind: ClassVar[str] = ""
    per_branch: ClassVar[bool] = True
    kinds: ClassVar[dict[str, type[Policy]]] = {}

    def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind or f"{cls.__module__}:{cls.__qualname__}"
        Policy.kinds[cls.kind] = cls

    # What it decides ----------------------------------------------------------------------------------------------

    def should_compute(self, query: GateQuery) -> bool | Tensor:
        """True or False for the whole call, or ``bool[B]`` with one decision per row.

        Raises:
            ConfigError: the class defines neither this nor :meth:`decisions`.
        """
        decided = self.decided(query.step, query.timestep, query.before, query.memory)
        answer = decided if decided is None or isinstance(decided, bool) else decided[query.branch.index]
        if answer is None:
            raise ConfigError(f"{type(self).__name__} decides nothing; define should_compute() or decisions() in it")
        return answer

    def observe(self, query: GateQuery) -> None:
        """What is asked where there is no choice: nothing is cached yet, or the model warms up."""
        if self.known_before_step:
            self.decided(query.step, query.timestep, query.before, query.memory)

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> Decisions:
        """What is known before a step; asked once at every step of a trajectory, those of the warm-up included.

        Args:
            step: index of the sampler step in this trajectory, from 0.
            timestep: the model's time input, or the step index where the model has none.
            before: that of the step before; None at the first.
            memory: a dictionary of this stream, emptied at every new trajectory, for rules that accumulate.
        """
        return None

    def decided(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> Decisions:
        """The :meth:`decisions` of a step, however often they are asked for."""
        known = memory.get(_DECIDED)
        if isinstance(known, _Decided) and known.policy is self and known.step == step:
            return known.decisions
        decisions = self.decisions(step, timestep, before, memory)
        memory[_DECIDED] = _Decided(self, step, decisions)
        return decisions

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        """For each branch how far linear reuse follows its line: 1 all the way, 0 not at all. None: all the way."""
        return None

    # What others must know ----------------------------------------------------------------------------------------

    @property
    def known_before_step(self) -> bool:
        """Whether :meth:`decisions` knows before a step what every branch does."""
        return type(self).decisions is not Policy.decisions

    @property
    def reads_gates(self) -> bool:
        """Whether gates are read, by the :meth:`row` of each step, so that an exported model needs predictors."""
        return False

    @property
    def gate_table(self) -> GateTable | None:
        """The gates that are read, for a graph that looks up its row itself; None where no table holds them."""
        return None

    def row(self, timestep: float, before: float | None) -> GateRow | None:
        """The gates of one step, for a host that hands them to an exported model; None if none are read."""
        return None if self.gate_table is None else self.gate_table.row(timestep, before)

    def step_table(self, branches: int) -> StepTable | None:
        """All that it decides for a model of so many branches, for a file in which that is fixed; None if it depends on
        more than the index of the step."""
        return None

    @property
    def steps(self) -> int | None:
        """How many calls of one trajectory this policy was made for; None if any number will do."""
        return None

    def mismatch_reason(self, step: int, timestep: float, before: float | None) -> str:
        """Why this policy was not made for a trajectory that has such a step, in words; empty if it may have been."""
        return ""

    def check(self, branches: Sequence[ResidualBranch]) -> None:
        """Raise :class:`ConfigError` if this policy was made for another model."""

    def describe(self) -> str:
        """What it does, on one line."""
        return type(self).__name__

    # How it is written down ---------------------------------------------------------------------------------------

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`from_dict` makes this policy of again: values that JSON can hold, and tensors.

        A dataclass has nothing to define: its fields are written.

        Raises:
            ConfigError: it holds something else.
        """
        if not is_dataclass(self) and vars(self):
            raise ConfigError(
                f"a policy of class {type(self).__name__} cannot be written to a file; make it a dataclass, or define "
                "to_dict() and from_dict() in it"
            )
        names = {item.name for item in fields(self) if item.init} if is_dataclass(self) else set[str]()
        held = {name: getattr(self, name) for name in sorted(names)}
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        return {name: value for name, value in held.items() if name not in tensors}, tensors

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """
        Raises:
            ConfigError: the values are not those of such a policy.
        """
        try:
            return cls(**values, **tensors)
        except TypeError as error:
            raise ConfigError(
                f"{cls.__name__} cannot be made of {one_line(', '.join([*values, *tensors]), 80)} ({shown(error, 80)})"
            ) from error


def spread(decisions: Decisions, branches: int) -> list[bool | None]:
    """One for each branch."""
    return [decisions] * branches if decisions is None or isinstance(decisions, bool) else list(decisions)


@dataclass(frozen=True)
class _Decided:
    policy: Policy
    step: int
    decisions: Decisions


@dataclass(frozen=True)
class AlwaysCompute(Policy, kind="always_compute"):
    """Never reuses: the transformed model equals the original bit for bit."""

    per_branch = False

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> bool:
        return True

    def step_table(self, branches: int) -> StepTable:
        return StepTable(CacheSchedule.always_compute(1, branches), repeats_from=0)

    def describe(self) -> str:
        return "every branch computes at every call"


@dataclass(frozen=True)
class Scheduled(Policy, kind="scheduled"):
    """Follows a :class:`CacheSchedule` by step index; steps beyond its end compute."""

    schedule: CacheSchedule

    def decisions(
        self, step: int, timestep: float, before: float | None, memory: dict[str, object]
    ) -> bool | Sequence[bool]:
        return True if step >= self.schedule.steps else self.schedule.should_compute[step].tolist()

    def step_table(self, branches: int) -> StepTable | None:
        return StepTable(self.schedule)

    @property
    def steps(self) -> int:
        return self.schedule.steps

    def describe(self) -> str:
        return f"a schedule of {self.schedule.steps} steps that reuses {self.schedule.lazy_ratio:.0%} of the branches"

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        written = self.schedule.to_json()
        return {"should_compute": written["should_compute"], "slopes": written["slopes"]}, {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        require_keys(values, {"should_compute": list, "slopes": list | None})
        rows, slopes = values["should_compute"], values["slopes"]
        if not all(
            isinstance(row, list) and len(row) == len(rows[0]) and all(x in (0, 1) for x in row) for row in rows
        ):
            raise ConfigError("policy.should_compute is not a table of 0 and 1 with one column per branch")
        try:
            table = None if slopes is None else np.array(slopes, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"policy.slopes is not a table of numbers ({error})") from error
        return cls(CacheSchedule(np.array(rows, dtype=bool), table))

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        slopes = self.schedule.slopes
        return None if slopes is None or step >= len(slopes) else slopes[step].tolist()

    def mismatch_reason(self, step: int, timestep: float, before: float | None) -> str:
        if step < self.schedule.steps:
            return ""
        return (
            f"the schedule has {self.schedule.steps} steps and the trajectory more, in which every branch computes; "
            "plan with the number of steps that you sample with"
        )

    def check(self, branches: Sequence[ResidualBranch]) -> None:
        if self.schedule.branches != len(branches):
            raise ConfigError(
                f"the schedule has {self.schedule.branches} branches, the model has {len(branches)}; "
                "plan a schedule for this model"
            )


def require_keys(values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: the values of a policy are not exactly these, each of its type.
    """
    for key in sorted(expected.keys() ^ values.keys()):
        raise ConfigError(f"it {'lacks' if key in expected else 'has an unknown key'} {shown('policy.' + key)}")
    for key, kind in expected.items():
        if type(values[key]) is not kind and not (isinstance(kind, UnionType) and isinstance(values[key], kind)):
            name = getattr(kind, "__name__", str(kind))
            raise ConfigError(f"policy.{key} is {shown(values[key])}, expected {name}")
