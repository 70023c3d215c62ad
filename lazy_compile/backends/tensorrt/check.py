"""Whether an engine can be lazy at all: each branch a jump over its kernels, and nothing heavy outside of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazy_compile.backends.tensorrt.layers import JUMP, JUMP_IF, EngineLayer
from lazy_compile.errors import ArtifactError, VerificationError

ALWAYS = ""
"""The key of what stands in no conditional, see :data:`HeavyNodes`."""

Arm = tuple[int, bool]
"""A conditional, and whether it is the arm that computes."""

HeavyNodes = Mapping[str, Sequence[str]]
"""Names of the heavy nodes of an ONNX model by the name of the ``If`` that holds them, or :data:`ALWAYS`."""


@dataclass(frozen=True)
class EngineBranch:
    """A conditional of an engine, and what runs on either side of it.

    Attributes:
        name: the ``If`` node that it was made from.
        position: index of its jump in the engine.
        compute: layers that run if the condition holds.
        reuse: layers that run if it does not.
    """

    name: str
    position: int
    compute: tuple[EngineLayer, ...]
    reuse: tuple[EngineLayer, ...]


@dataclass(frozen=True)
class EngineStructure:
    """Where the kernels of an engine stand, and what is wrong with that.

    Attributes:
        layers: all layers in the order in which they run.
        branches: its conditionals.
        always_on: layers that run at every step.
        problems: one line for each way in which the engine does not do what it should; empty if it is sound.
    """

    layers: tuple[EngineLayer, ...]
    branches: tuple[EngineBranch, ...]
    always_on: tuple[EngineLayer, ...]
    problems: tuple[str, ...]

    @property
    def heavy_always(self) -> int:
        """Heavy kernels that run at every step: embedders, adaLN, the final projection."""
        return _heavy(self.always_on)

    @property
    def heavy_inside(self) -> int:
        """Heavy kernels that a reused branch skips."""
        return sum(_heavy(branch.compute) for branch in self.branches)

    @property
    def fused_attention(self) -> int:
        """Fused attention kernels, in branches or not."""
        return sum(layer.is_fused_attention for layer in self.layers)

    @property
    def host_copies(self) -> int:
        """Values that the host reads; each waits for the GPU."""
        return sum(layer.is_host_copy for layer in self.layers)

    @property
    def host_copies_before_first_branch(self) -> int:
        first = min((branch.position for branch in self.branches), default=len(self.layers))
        return sum(layer.is_host_copy for layer in self.layers[:first])

    def segments(self) -> Iterator[tuple[tuple[EngineLayer, ...], EngineBranch | None]]:
        """What runs at every step before each branch, and the branch; at last what runs after all of them."""
        inside = {layer.name for branch in self.branches for layer in (*branch.compute, *branch.reuse)}
        starts = {branch.position: branch for branch in self.branches}
        always: list[EngineLayer] = []
        for position, layer in enumerate(self.layers):
            if position in starts:
                yield tuple(always), starts[position]
                always = []
            elif layer.kind not in (JUMP, JUMP_IF) and layer.name not in inside:
                always.append(layer)
        yield tuple(always), None

    def require(self, name: str) -> None:
        """
        Raises:
            VerificationError: a branch is missing, or something heavy runs outside of it.
        """
        if self.problems:
            raise VerificationError(
                f"{name} is not as lazy as it should be: {'; '.join(self.problems)}; check the ONNX file it was built "
                "from with lazy-compile verify, and report what its builder moved"
            )

    def summary(self) -> dict[str, Any]:
        """The counts and the problems, as JSON has them."""
        return {
            "layers": len(self.layers),
            "branches": len(self.branches),
            "heavy_inside": self.heavy_inside,
            "heavy_always": self.heavy_always,
            "fused_attention": self.fused_attention,
            "host_copies": self.host_copies,
            "host_copies_before_first_branch": self.host_copies_before_first_branch,
            "problems": list(self.problems),
        }


def check_branches(
    layers: Sequence[EngineLayer], conditionals: int | None = None, nodes: HeavyNodes | None = None
) -> EngineStructure:
    """Look for each branch's jump, and for what runs outside of it.

    A heavy kernel outside every arm is a fault if either of two independent signs says so:

    1. the names that it carries: one of its ONNX nodes stands inside an ``If`` of the model, or in no place at all;
    2. the dataflow, without regard to names: whatever reads its result, directly or through other layers, stands in
       one arm of one conditional.

    Args:
        layers: of the engine, see :func:`~lazy_compile.backends.tensorrt.layers.parse_layers`.
        conditionals: how many there should be; None if that is not known.
        nodes: where the heavy nodes of its ONNX model stand; None if that is not known.
    """
    branches, inside = _branches(layers)
    always_on = tuple(
        layer for position, layer in enumerate(layers) if position not in inside and layer.kind not in (JUMP, JUMP_IF)
    )
    problems = []
    if conditionals is not None and len(branches) != conditionals:
        problems.append(f"{len(branches)} conditional jumps for {conditionals} branches")
    for text, names in (
        ("heavy kernels of a branch run at every step", _escaped(layers, branches, inside, nodes)),
        ("heavy kernels stand in another branch than their nodes", _misplaced(branches, nodes)),
        ("heavy kernels run while a branch is reused", _names(layer for item in branches for layer in item.reuse)),
        ("conditionals compute nothing heavy", [item.name for item in branches if not _heavy(item.compute)]),
    ):
        if names:
            problems.append(f"{len(names)} {text}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    return EngineStructure(tuple(layers), tuple(branches), always_on, tuple(problems))


def _branches(layers: Sequence[EngineLayer]) -> tuple[list[EngineBranch], dict[int, Arm]]:
    """All conditionals that stand in no other one, and the arm of every layer in one."""
    position_of = {layer.name: position for position, layer in enumerate(layers)}
    branches: list[EngineBranch] = []
    inside: dict[int, Arm] = {}
    for position, layer in enumerate(layers):
        if layer.kind != JUMP_IF or position in inside:
            continue
        try:
            then, otherwise = position_of[layer.then_target], position_of[layer.else_target]
        except KeyError as error:
            raise ArtifactError(
                f"the layer list is cut off: {layer.name!r} jumps to {error}, which is not in it"
            ) from None
        first, second = sorted((then, otherwise))
        # The first arm ends with a jump behind the second; one without a jump runs on into what follows both.
        last = layers[second - 1]
        end = position_of.get(last.target, len(layers)) if last.kind == JUMP else second
        arms = {first: range(first, second), second: range(second, end)}
        for start, arm in arms.items():
            inside.update(dict.fromkeys(arm, (len(branches), start == then)))
        compute, reuse = (
            tuple(layers[index] for index in arms[start] if layers[index].kind != JUMP) for start in (then, otherwise)
        )
        branches.append(EngineBranch(layer.nodes[0] if layer.nodes else layer.name, position, compute, reuse))
    return branches, inside


def _escaped(
    layers: Sequence[EngineLayer], branches: Sequence[EngineBranch], inside: Mapping[int, Arm], nodes: HeavyNodes | None
) -> list[str]:
    """Heavy layers outside that should be inside."""
    served = _served(layers, inside)
    known = {name: place for place, names in (nodes or {}).items() for name in names}
    found = []
    for position, layer in enumerate(layers):
        if layer.is_heavy and position not in inside:
            places = {known[name] for name in layer.nodes if name in known}
            if position in served or places - {ALWAYS}:
                found.append(_described(layer))
    return found


def _served(layers: Sequence[EngineLayer], inside: Mapping[int, Arm]) -> set[int]:
    """Layers outside whose results are needed only in one arm of one conditional."""
    readers: dict[str, set[int]] = defaultdict(set)
    for position, layer in enumerate(layers):
        for tensor in layer.inputs:
            readers[tensor].add(position)
    only: dict[int, Arm] = {}
    for position in reversed(range(len(layers))):
        reading = {reader for tensor in layers[position].outputs for reader in readers[tensor] if reader > position}
        served = {inside.get(reader, only.get(reader)) for reader in reading}
        if position not in inside and len(served) == 1 and (arm := served.pop()) is not None:
            only[position] = arm
    return set(only)


def _misplaced(branches: Sequence[EngineBranch], nodes: HeavyNodes | None) -> list[str]:
    known = {name: place for place, names in (nodes or {}).items() for name in names}
    return [
        _described(layer)
        for branch in branches
        for layer in branch.compute
        if layer.is_heavy and any(known.get(name, branch.name) not in (branch.name, ALWAYS) for name in layer.nodes)
    ]


def _heavy(layers: Iterable[EngineLayer]) -> int:
    return sum(layer.is_heavy for layer in layers)


def _names(layers: Iterable[EngineLayer]) -> list[str]:
    return [_described(layer) for layer in layers if layer.is_heavy]


def _described(layer: EngineLayer) -> str:
    return "+".join(layer.nodes) or layer.name
