"""Options of a transformation: what is gated, how a reused output is formed, and when reuse is forbidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lazy_compile.errors import ConfigError

ReuseArm = Literal["last", "linear"]
BatchRule = Literal["per_sample", "all_reuse", "majority", "any_reuse"]
Group = int | Literal["block"]


@dataclass(frozen=True)
class LazyConfig:
    """How a model is made lazy.

    Attributes:
        reuse: what a skipped branch returns. ``"linear"`` extrapolates from its last two computed outputs over the
            step index, ``"last"`` repeats the last one (LazyDiT). Linear keeps one more tensor per output.
        warmup_steps: the first steps of a trajectory that always compute; at least 1, since nothing is cached before.
        max_reuse_age: a branch that was reused this many steps in a row computes at the next one. None: no limit.
        batch_rule: ``"per_sample"`` decides for every row of the batch and computes only the rows that need it. The
            others take one decision per call: ``"all_reuse"`` reuses only if every row would, ``"any_reuse"`` if one
            would, ``"majority"`` if more than half would. Branches whose rows cannot be separated take one decision
            per call, from the mean over the whole batch.
        group: how many consecutive branches share the decision of the first of them; ``"block"`` for all branches of a
            transformer block. Caches stay one per branch.
        conv_branches: also gate residual branches made of dense convolutions (the ResNet blocks of a U-Net).
        timestep_input: the name of the forward argument that carries the timestep. None finds it in the graph.
        hoist_step_invariants: compute what depends only on inputs that stay the same (keys and values of the text, say)
            once per trajectory and keep it; in PyTorch, without gradients. Results are the same bit for bit.
        max_captures: how many graphs (one per set of shapes that cannot share one) are kept, least recently used first.
    """

    reuse: ReuseArm = "linear"
    warmup_steps: int = 1
    max_reuse_age: int | None = None
    batch_rule: BatchRule = "per_sample"
    group: Group = 1
    conv_branches: bool = False
    timestep_input: str | None = None
    hoist_step_invariants: bool = True
    max_captures: int = 8

    def __post_init__(self) -> None:
        _require_one_of("reuse", self.reuse, get_args(ReuseArm))
        _require_one_of("batch_rule", self.batch_rule, get_args(BatchRule))
        check_group(self.group)
        if self.warmup_steps < 1:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; at least 1 step must compute to fill the caches")
        if self.max_reuse_age is not None and self.max_reuse_age < 1:
            raise ConfigError(f"max_reuse_age is {self.max_reuse_age}; use 1 or more, or None for no limit")
        if self.max_captures < 1:
            raise ConfigError(f"max_captures is {self.max_captures}; use 1 or more")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LazyConfig:
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
        return cls(**values)


def check_group(group: object) -> None:
    if group != "block" and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise ConfigError(f"group is {group!r}; expected the number of branches that share a gate, or 'block'")


def _require_one_of(option: str, seen: object, allowed: tuple[str, ...]) -> None:
    if seen not in allowed:
        raise ConfigError(f"{option} is {seen!r}; expected one of {', '.join(map(repr, allowed))}")


def chosen_config(config: LazyConfig | None, options: Mapping[str, Any]) -> LazyConfig:
    """The one given, or made of options by name.

    Raises:
        ConfigError: both are given, or one is not of the expected form.
    """
    if config is not None and not isinstance(config, LazyConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected LazyConfig(...), or give options by name")
    if config is not None and options:
        raise ConfigError(f"give either config or options by name, not both; seen both config and {', '.join(options)}")
    return config or LazyConfig.from_dict(dict(options))
