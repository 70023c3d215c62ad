"""Which initializers of an exported file hold which weights of the model.

An exported file says of every parameter and buffer that it reads where it lies: in initializers of its own, as it is or
transposed, together with others of the same content, or nowhere, folded into a constant.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lazy_compile.digests import digest_of
from lazy_compile.ir.program import Program, Role, module_state

if TYPE_CHECKING:
    from onnx_ir import Model, Value

WEIGHTS_KEY = "lazy_compile.weights"
"""The entry of ``ModelProto.metadata_props`` that says where weights lie; its value is JSON."""

_PLACES, _READ = "weight_places", "weights_read"
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


@dataclass(frozen=True)
class Place:
    """An initializer that holds a weight; its two axes changed places if it is transposed."""

    value: Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for size in self.value.shape or () if isinstance(size, int))

    def arranged(self, weight: Tensor) -> Tensor:
        """The weight as the initializer holds it."""
        dtype = getattr(torch, str(self.value.dtype.numpy()))  # type: ignore[union-attr]
        return (weight.t() if self.transposed else weight).detach().cpu().to(dtype).contiguous()

    def holds(self, weight: Tensor) -> bool:
        """Whether that is what it holds."""
        wanted = self.arranged(weight)
        if tuple(wanted.shape) != self.shape or self.value.const_value is None:
            return False
        content = bytearray(self.value.const_value.tobytes())
        return not content or torch.equal(torch.frombuffer(content, dtype=wanted.dtype).reshape(wanted.shape), wanted)


def note_places(model: Model, original: nn.Module, program: Program) -> None:
    """Remember where the weights lie in what the exporter has just made of a program; names may change later.

    1. An initializer with the name of a weight holds it.
    2. One that was folded from a single weight holds it if it has its content, as it is or transposed. If it could be
       both, a square matrix of zeros say, nobody knows.
    3. Weights of equal content share one initializer: one without a place is looked for in those of the others.
    4. A weight that was folded into something else too has no place.
    """
    state = module_state(original)
    inputs = zip(program.placeholders, program.inputs, strict=True)
    read = {item.name for node, item in inputs if node.users and item.role in (Role.PARAMETER, Role.BUFFER)}
    state = {name: state[name] for name in read - _not_saved(original)}
    places: dict[str, list[Place]] = {}
    lost: set[str] = set()
    for value in model.graph.initializers.values():
        folded = ast.literal_eval(value.metadata_props.get(_FOLDED_FROM, "[]"))
        names = {name.removeprefix("original.") for name in folded or [str(value.name)]} & state.keys()
        found = [Place(value, False)]
        if folded:
            found = [] if len(folded) > 1 or not names else _folded_places(value, state[min(names)])
        if len(found) == 1:
            for name in names:
                places.setdefault(name, []).append(found[0])
        else:
            lost |= names
    for name in state.keys() - places.keys() - lost:
        equal = [each for several in places.values() for each in several if each.holds(state[name])]
        if equal:
            places[name] = equal[:1]
    model.meta[_PLACES] = {name: several for name, several in places.items() if name not in lost}
    model.meta[_READ] = frozenset(state)


def _not_saved(model: nn.Module) -> set[str]:
    """Buffers that no state dict holds."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _folded_places(value: Value, weight: Tensor) -> list[Place]:
    candidates = [Place(value, False)] + ([Place(value, True)] if weight.dim() == 2 else [])
    return [place for place in candidates if place.holds(weight)]


def write_places(model: Model, original: nn.Module) -> None:
    """Write down where the weights lie, and a digest of those that the file reads and that lie nowhere."""
    places: Mapping[str, list[Place]] = model.meta[_PLACES]
    state = module_state(original)
    entry = {
        "places": {name: [[each.value.name, each.transposed] for each in found] for name, found in places.items()},
        "contents": {name: digest_of_weight(state[name]) for name in sorted(model.meta[_READ] - places.keys())},
    }
    model.metadata_props[WEIGHTS_KEY] = json.dumps(entry)


def digest_of_weight(weight: Tensor) -> str:
    """Its type, and a digest of its content."""
    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{weight.dtype} {digest_of(content.numpy().tobytes())}"
