"""What an exported model says about itself, so that a runtime needs nothing but the file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lazy_compile.backends.onnx.metadata_schema import check_contract
from lazy_compile.backends.onnx.sizes import Size, at_sizes, bound_sizes, holds, spelled_sizes
from lazy_compile.config import BatchRule, ReuseArm
from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.serialize import from_json, to_json
from lazy_compile.storage import parse_json

logger = logging.getLogger("lazy_compile")

KEY = "lazy_compile"
"""The entry of ``ModelProto.metadata_props``; its value is JSON."""

SIZES_KEY = "lazy_compile.sizes"
"""The entry of a file that is no lazy model any more, and has free sizes: JSON of those of the example call."""

VERSION = 6
UNSEALED = 4
"""It held no policy, and no digest stood at the end of a file."""

READABLE = (UNSEALED, 5, VERSION)
"""All sizes of 5 were fixed."""

MAX_POLICY_BYTES = 256 * 2**20
"""A file carries no more than this for its policy: gates of a model of 60 blocks and 50 steps take a fifth of it."""

BATCH = "batch"
"""The name of the free size that counts the rows of a call."""

Gating = Literal["predicate", "input", "schedule"]


@dataclass(frozen=True)
class InputSpec:
    """An input or result: its name, shape and dtype; a size is a number, or a formula over the free sizes."""

    name: str
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class FreeSize:
    """A size that a call decides: its name, the range to build engines for, and what it was in the example call.

    ``least`` and ``most`` are 0 where no range was given.
    """

    name: str
    example: int
    least: int = 0
    most: int = 0


@dataclass(frozen=True)
class SlotSpec:
    """A cache slot: the input, the output that is its next value, and what it holds before the first step."""

    input: str
    output: str
    shape: tuple[Size, ...]
    dtype: str
    initial: float


@dataclass(frozen=True)
class OnnxMetadata:
    """The contract of an exported model, beside its graph.

    Attributes:
        model: class of the original.
        branches: the gated branches in the order of ``gate_bias`` and ``compute_logits``.
        inputs: the user's inputs, in the order of the original's arguments.
        outputs: the model's own outputs; None for one that is no tensor.
        results: the outputs that are no slots: the model's own, and the logits of gates that are read.
        slots: all cache slots.
        sizes: the free sizes, each of which is the length of an axis of one of ``inputs``.
        conditions: what the free sizes must satisfy, see :mod:`lazy_compile.backends.onnx.sizes`.
        invariants: inputs whose values stay the same along a trajectory; the prologue computes them from some of
            ``inputs``. A file takes those of both that it reads.
        prologue: the digest that the prologue carries, see :mod:`lazy_compile.backends.onnx.prologue`; empty if there
            is none.
        reuse: what a branch returns that does not compute.
        batch_rule: how the decisions of the rows are joined.
        gating: who decides. ``"predicate"``: the gates in the graph, by the row of a gate table that comes in.
            ``"input"``: the host, by one boolean for each gate. ``"schedule"``: nobody, the decisions are fixed.
        leaders: for each branch, the one that decides for it.
        predictors: whether gates are read, and their logits come out.
        conditionals: how many ``If`` nodes the model was exported with.
        should_compute: the fixed decisions of ``gating="schedule"``; empty otherwise.
        fingerprint: of the original, see :func:`lazy_compile.runtime.artifact.fingerprint`.
        arguments: names of the original's positional arguments, in order.
        timestep_input: which input carries the timestep; None if the model has none.
        output_spec: how to build the original's return value from flat outputs, as ``treespec_dumps`` writes it; empty
            if it cannot be written.
        total_macs: of one dense evaluation.
        warmup_steps: first steps that compute, see :class:`~lazy_compile.config.LazyConfig`; a host sees to it.
        max_reuse_age: reuses in a row after which a branch computes; a host sees to it.
        policy: the rule that a host follows unless told otherwise, as :mod:`lazy_compile.policies.serialize` writes it;
            None if the file carries none.
    """

    model: str
    branches: tuple[ResidualBranch, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str | None, ...]
    slots: tuple[SlotSpec, ...]
    invariants: tuple[InputSpec, ...]
    prologue: str
    reuse: ReuseArm
    batch_rule: BatchRule
    gating: Gating
    leaders: tuple[int, ...]
    predictors: bool
    conditionals: int
    should_compute: tuple[bool, ...]
    fingerprint: str
    arguments: tuple[str, ...]
    timestep_input: str | None
    output_spec: str
    total_macs: int
    warmup_steps: int
    max_reuse_age: int | None
    policy: dict[str, Any] | None = None
    results: tuple[InputSpec, ...] = ()
    sizes: tuple[FreeSize, ...] = ()
    conditions: tuple[str, ...] = ()

    @property
    def example(self) -> dict[str, int]:
        """The free sizes of the example call."""
        return {size.name: size.example for size in self.sizes}

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The free sizes of a call.

        Args:
            shapes: of the model's own inputs.

        Raises:
            ConfigError: a shape does not fit, or the model does not hold for these sizes.
        """
        sizes = bound_sizes({spec.name: spec.shape for spec in self.inputs}, shapes)
        for condition in self.conditions:
            if not holds(condition, sizes):
                raise ConfigError(
                    f"this {self.model} was exported for sizes with {condition}; seen {spelled_sizes(sizes)}: use such "
                    "sizes, or export another file with an example call of these"
                )
        return sizes

    def at_sizes(self, fixed: Mapping[str, int]) -> OnnxMetadata:
        """The same where some of the free sizes are these and no others."""

        def length(size: Size) -> Size:
            return size if isinstance(size, int) else at_sizes(size, fixed)

        def specialised(specs: Sequence[Any]) -> Any:
            return tuple(replace(spec, shape=tuple(map(length, spec.shape))) for spec in specs)

        return replace(
            self,
            inputs=specialised(self.inputs),
            results=specialised(self.results),
            slots=specialised(self.slots),
            invariants=specialised(self.invariants),
            sizes=tuple(size for size in self.sizes if size.name not in fixed),
            conditions=tuple(text for text in map(length, self.conditions) if isinstance(text, str)),
        )

    def read_policy(self) -> Policy | None:
        """
        Raises:
            ArtifactError: it is of a kind that is not defined in this process, or damaged.
        """
        return None if self.policy is None else from_json(self.policy, f"the exported {self.model}")

    def refusal(self, policy: Policy) -> str:
        """Why a policy cannot steer this model, in words; empty if it can."""
        name = type(policy).__name__
        if not policy.reads_gates:
            if policy.known_before_step:
                return ""
            return (
                f"{name} decides by the activations in a branch, which exported models do not show; use a policy that "
                "defines decisions(), such as Scheduled(...)"
            )
        delayed = policy.known_before_step
        if self.gating == "predicate" and not delayed:
            return ""
        if self.gating == "input" and self.predictors and delayed:
            return ""
        kind = f"gating={self.gating!r}" + (" and no predictors" if not self.predictors else "")
        return (
            f"{name}(..., delayed={delayed}) cannot steer a model that was exported with {kind}: export with "
            "gating='predicate' for Learned(...), with gating='input' and predictors for Learned(..., delayed=True), "
            "or use Scheduled(...)"
        )

    def with_policy(self, policy: Policy) -> OnnxMetadata:
        """The same with a policy to be followed, if this model can follow it and a file can hold it; else a warning
        says why not, and a host must be given one."""
        try:
            reason = self.refusal(policy)
            written = None if reason else to_json(policy)
        except ConfigError as error:
            reason, written = str(error), None
        if written is not None and (size := len(json.dumps(written))) > MAX_POLICY_BYTES:
            reason, written = f"it takes {size >> 20} MiB, a file carries {MAX_POLICY_BYTES >> 20} at most", None
        if written is None:
            logger.warning("the exported %s carries no policy; give its runner one: %s", self.model, reason)
        return replace(self, policy=written)

    def __post_init__(self) -> None:
        check_contract(self)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, default=lambda kind: kind.value)

    @classmethod
    def parse(cls, properties: Mapping[str, str]) -> OnnxMetadata:
        """
        Raises:
            ArtifactError: the model was written by something else, or its description is damaged.
        """
        if KEY not in properties:
            raise ArtifactError("this ONNX file was not written by export_onnx: it does not describe its branches")
        try:
            values = parse_json(properties[KEY], "the description inside this ONNX file", infinity=True)
            if values.pop("version") not in READABLE:
                raise ValueError(f"its version is not {VERSION}")
            values["branches"] = tuple(_branch(item) for item in values["branches"])
            for name in ("inputs", "invariants", "results"):
                values[name] = tuple(InputSpec(**_tuples(item)) for item in values.get(name, ()))
            values["sizes"] = tuple(FreeSize(**item) for item in values.get("sizes", ()))
            values["slots"] = tuple(SlotSpec(**_tuples(item)) for item in values["slots"])
            return cls(**_tuples(values))
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise ArtifactError(
                f"the description inside this ONNX file is damaged ({one_line(repr(error))}); export the model again"
            ) from error


def first_line(error: BaseException) -> str:
    """An error of another library on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0], 160) if lines else type(error).__name__


def _branch(values: dict[str, Any]) -> ResidualBranch:
    for role in ("entries", "outputs"):
        values[role] = tuple(BranchTensor(**_tuples(item)) for item in values[role])
    return ResidualBranch(**{**values, "kind": BranchKind(values["kind"])})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
