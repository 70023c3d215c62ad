"""Options of a transformation: what is gated, how a reused output is formed, and when reuse is forbidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lazy_compile.errors import ConfigError, shown

ReuseArm = Literal["last", "linear", "taylor"]
BatchRule = Literal["per_sample", "all_reuse", "majority", "any_reuse"]
Group = int | Literal["block"]
Granularity = int | Literal["branch", "block", "model"]
Probe = Literal["first_block"]
CacheDtype = Literal["bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"]


MAX_ORDER = 3
"""Of ``reuse="taylor"``: higher orders only amplify noise."""


def reuse_order(reuse: ReuseArm, order: int) -> int:
    """How many computed values before the last one a reuse arm needs."""
    return {"last": 0, "linear": 1}.get(reuse, order)


@dataclass(frozen=True)
class LazyConfig:
    """How a model is made lazy.

    Attributes:
        reuse: what a skipped branch returns. ``"linear"`` extrapolates from its last two computed outputs over the
            step index, ``"last"`` repeats the last one (LazyDiT), ``"taylor"`` extrapolates from the last ``order + 1``
            (as TaylorSeer, with other weights). One more tensor per output is kept for each order.
        order: of ``reuse="taylor"``, 1 to 3; where fewer values were computed yet, a lower one is taken.
        warmup_steps: the first steps of a trajectory that always compute; at least 1, since nothing is cached before.
        max_reuse_age: a branch that was reused this many steps in a row computes at the next one. None: no limit.
        batch_rule: ``"per_sample"`` decides for every row of the batch and computes only the rows that need it. The
            others take one decision per call: ``"all_reuse"`` reuses only if every row would, ``"any_reuse"`` if one
            would, ``"majority"`` if more than half would. Branches whose rows cannot be separated take one decision
            per call, from the mean over the whole batch.
        group: how many consecutive branches share the decision of the first of them; ``"block"`` for all branches of a
            transformer block. Caches stay one per branch.
        granularity: what is decided and cached as one: every ``"branch"``; every transformer ``"block"``, norms and
            modulation included; a number of spans of about the same work; or the whole stack of the ``"model"``. Of a
            block and more, one tensor is kept for each residual stream: the difference from its start to its end.
            Where a model cannot be cut so, a warning says what is done instead.
        probe: ``"first_block"`` leaves the first block out of all spans, so that it always computes and a policy can
            decide by what comes out of it. Needs a granularity other than ``"branch"``.
        cache_dtype: the type in which caches are kept, such as ``"bfloat16"`` or ``"float8_e4m3fn"`` (with a scale for
            each sample); None keeps that of the outputs. Of models that run in PyTorch.
        cache_device: where caches are kept, such as ``"cpu"``: pinned, where the model runs on a GPU. None keeps them
            beside the model. Of models that run in PyTorch.
        max_cache_bytes: the most that the caches of the rows of one call may take. When the model is captured, the
            first that fits is taken of ``cache_dtype`` as given and bfloat16, coarser granularities, and lower orders
            of reuse; a message says what. In a larger call branches that find no room are not cached, and compute.
        conv_branches: also gate residual branches made of dense convolutions (the ResNet blocks of a U-Net).
        timestep_input: the name of the forward argument that carries the timestep. None finds it in the graph.
        hoist_step_invariants: compute what depends only on inputs that stay the same (keys and values of the text, say)
            once per trajectory and keep it; in PyTorch, without gradients. Results are the same bit for bit.
        max_captures: how many graphs (one per set of shapes that cannot share one) are kept, least recently used first.
    """

    reuse: ReuseArm = "linear"
    order: int = 2
    warmup_steps: int = 1
    max_reuse_age: int | None = None
    batch_rule: BatchRule = "per_sample"
    group: Group = 1
    granularity: Granularity = "branch"
    probe: Probe | None = None
    cache_dtype: CacheDtype | None = None
    cache_device: str | None = None
    max_cache_bytes: int | None = None
    conv_branches: bool = False
    timestep_input: str | None = None
    hoist_step_invariants: bool = True
    max_captures: int = 8

    def __post_init__(self) -> None:
        _require_one_of("reuse", self.reuse, get_args(ReuseArm))
        _require_one_of("batch_rule", self.batch_rule, get_args(BatchRule))
        if not 1 <= self.order <= MAX_ORDER:
            raise ConfigError(f"order is {shown(self.order)}; expected 1 to {MAX_ORDER}")
        check_group(self.group)
        check_granularity(self.granularity)
        if self.probe is not None:
            _require_one_of("probe", self.probe, get_args(Probe))
        if self.probe is not None and self.granularity == "branch":
            raise ConfigError(f"probe={self.probe!r} needs spans; set granularity to 'block', 'model' or a number too")
        if self.cache_dtype is not None:
            _require_one_of("cache_dtype", self.cache_dtype, get_args(CacheDtype))
        if self.max_cache_bytes is not None and self.max_cache_bytes < 1:
            raise ConfigError(f"max_cache_bytes is {shown(self.max_cache_bytes)}; use 1 or more, or None for no limit")
        if self.warmup_steps < 1:
            raise ConfigError(
                f"warmup_steps is {shown(self.warmup_steps)}; at least 1 step must compute to fill the caches"
            )
        if self.max_reuse_age is not None and self.max_reuse_age < 1:
            raise ConfigError(f"max_reuse_age is {shown(self.max_reuse_age)}; use 1 or more, or None for no limit")
        if self.max_captures < 1:
            raise ConfigError(f"max_captures is {shown(self.max_captures)}; use 1 or more")

    @property
    def values_kept(self) -> int:
        """How many tensors a cache keeps of each output."""
        return 1 + reuse_order(self.reuse, self.order)

    @property
    def structure(self) -> tuple[object, ...]:
        """Those options that a captured graph is made for: another value needs another graph."""
        return self.conv_branches, self.granularity, self.probe

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LazyConfig:
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown option {shown(unknown[0], 60)}; the options are {', '.join(sorted(known))}")
        return cls(**values)


def check_group(group: object) -> None:
    if group != "block" and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise ConfigError(f"group is {shown(group)}; expected the number of branches that share a gate, or 'block'")


def check_granularity(granularity: object) -> None:
    number = isinstance(granularity, int) and not isinstance(granularity, bool) and granularity >= 1
    if not number and granularity not in ("branch", "block", "model"):
        raise ConfigError(
            f"granularity is {shown(granularity)}; expected 'branch', 'block', 'model', or a number of spans"
        )


def _require_one_of(option: str, seen: object, allowed: tuple[str, ...]) -> None:
    if seen not in allowed:
        raise ConfigError(f"{option} is {shown(seen)}; expected one of {', '.join(map(repr, allowed))}")


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
