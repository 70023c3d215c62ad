"""What a builder made of a network: its final list of kernels, copies and jumps, read from what it says about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lazy_compile.errors import ArtifactError, one_line, shown
from lazy_compile.storage import parse_json

JUMP_IF, JUMP = "cjmp", "jmp"

LayerRole = Literal["product", "attention", "host copy", "other"]
"""Products are matrix products and convolutions; attention is a fused kernel."""

_LINE = re.compile(r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w+), (?P<rest>.*)")
_PARTS = re.compile(
    r"Inputs: (?P<Inputs>\[.*?\]), Constants: \[.*\], Outputs: (?P<Outputs>\[.*?\]), TacticName: (?P<TacticName>[^,]*)"
)
_TENSOR = re.compile(r"\{ Name: (.+?), (?:Dimensions|Location)")
_TARGET = re.compile(r"(JumpTarget\w*): (.*?)(?=, (?:JumpTarget\w*|Metadata)\b|$)")
_NODE = re.compile(r"\[ONNX Layer: ([^|\]\x1e]+?)(?: \|[^\]]*)?\]")

_PROFILE = re.compile(r"\[profile (\d{1,9})\]")
_GRAPH = re.compile(r"_(myl\d+)_\d+$")

_HEAVY_KIND = re.compile(r"gemm|matmul|matrixmultiply|matrix_multiply|conv|correlation|attention|mha", re.IGNORECASE)
_HEAVY_NAME = re.compile(r"gemm|mha|attention|(?:^|_|[a-z])(?:Fc|Gemm|Mmul)(?=[A-Z_])")


@dataclass(frozen=True)
class EngineLayer:
    """One step of an engine.

    Attributes:
        name: unique in the engine.
        kind: as the builder calls it: ``gemm``, ``kgen`` (generated), ``copy``, ``cjmp``, ``jmp`` ...
        inputs: names of the tensors that it reads, constants apart.
        outputs: names of the tensors that it writes.
        tactic: the kernel.
        nodes: names of the ONNX nodes that it implements.
        then_target: of a conditional jump, the layer that runs next if the condition holds.
        else_target: the one that runs next if it does not.
        target: of a jump, the layer that runs next.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    tactic: str = ""
    nodes: tuple[str, ...] = ()
    then_target: str = ""
    else_target: str = ""
    target: str = ""

    @property
    def is_heavy(self) -> bool:
        """Whether it multiplies matrices or convolves; told from its kind and its kernel's name."""
        if self.kind in (JUMP, JUMP_IF, "copy"):
            return False
        # The name of a library kernel repeats those of the nodes that it implements; a generated kernel's is its own.
        generated = self.kind in ("kgen", "runtime_fusion")
        return bool(_HEAVY_NAME.search(self.name) if generated else _HEAVY_KIND.search(self.kind))

    @property
    def is_fused_attention(self) -> bool:
        return "mha" in f"{self.name} {self.tactic}"

    @property
    def role(self) -> LayerRole:
        """The one thing to know about it."""
        if self.is_fused_attention:
            return "attention"
        if self.is_heavy:
            return "product"
        return "host copy" if self.is_host_copy else "other"

    @property
    def is_host_copy(self) -> bool:
        """Whether it brings a value to the host, which must read a condition before it can jump."""
        return self.kind == "copy" and "d2h" in self.name


def parse_layers(text: str) -> tuple[EngineLayer, ...]:
    """The layer list in a builder's log, or in what an engine inspector returns, as JSON or one layer a line; that of
    the first optimization profile, should there be several.

    The builder must have run with ``ProfilingVerbosity.DETAILED``, and its log hold the messages of ``VERBOSE``.

    Raises:
        ArtifactError: there is no such list in it.
    """
    return parse_profiles(text)[0]


def parse_profiles(text: str) -> list[tuple[EngineLayer, ...]]:
    """The same for each optimization profile: an engine has kernels of its own for each of them, one list after the
    other. Tensors and nodes of all but the first carry its number, and so does the graph that a layer belongs to.

    Raises:
        ArtifactError: there is no list of layers in it.
    """
    try:
        layers = tuple(map(_from_fields, _json_fields(text) or _line_fields(text)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"a layer of this engine is described otherwise ({one_line(repr(error))}); expected what an engine "
            "inspector wrote"
        ) from error
    if not layers:
        raise ArtifactError(
            "this holds no list of layers; expected the VERBOSE log of a build with detailed profiling, or what an "
            "engine inspector wrote"
        )
    profiles: dict[str, int] = {}
    for layer in layers:
        tags = [int(tag) for name in (layer.name, *layer.inputs, *layer.outputs) for tag in _PROFILE.findall(name)]
        profiles[_graph_of(layer)] = max(profiles.get(_graph_of(layer), 0), *tags, 0)
    parts: dict[int, list[EngineLayer]] = {}
    for layer in layers:
        parts.setdefault(profiles[_graph_of(layer)], []).append(layer)
    return [tuple(parts[number]) for number in sorted(parts)]


def _graph_of(layer: EngineLayer) -> str:
    """The part of an engine that was compiled as one; a layer without one is told by its own names."""
    found = _GRAPH.search(layer.name)
    return found[1] if found else f"layer {layer.name}"


def _json_fields(text: str) -> list[Mapping[str, Any]]:
    if not text.lstrip().startswith("{"):
        return []
    layers = parse_json(text, "the JSON of an engine inspector", infinity=True).get("Layers", [])
    if not isinstance(layers, list):
        raise ArtifactError(f"the layers of this engine are {shown(layers)}; expected what an engine inspector wrote")
    if any(isinstance(layer, str) for layer in layers):
        raise ArtifactError("this engine knows only the names of its layers; build it with detailed profiling")
    return layers


def _line_fields(text: str) -> Iterator[Mapping[str, Any]]:
    for line in _last_list(text.splitlines()):
        if match := _LINE.search(line):
            fields: dict[str, Any] = match.groupdict()
            rest = fields.pop("rest")
            if parts := _PARTS.search(rest):
                fields.update(parts.groupdict())
            fields.update(dict(_TARGET.findall(rest)))
            fields["Metadata"] = rest.partition("Metadata: ")[2]
            yield fields


def _last_list(lines: Sequence[str]) -> Sequence[str]:
    """A builder may list several times, as it optimizes or as it builds several engines."""
    found = [bool(_LINE.search(line)) for line in lines]
    end = len(found) - found[::-1].index(True) if True in found else 0
    start = end - next((length for length, layer in enumerate(reversed(found[:end])) if not layer), end)
    return lines[start:end]


def _from_fields(fields: Mapping[str, Any]) -> EngineLayer:
    return EngineLayer(
        name=str(fields["Name"]),
        kind=str(fields.get("LayerType", "")),
        inputs=_tensors(fields.get("Inputs", ())),
        outputs=_tensors(fields.get("Outputs", ())),
        tactic=str(fields.get("TacticName", "")),
        nodes=tuple(dict.fromkeys(_NODE.findall(str(fields.get("Metadata", ""))))),
        then_target=str(fields.get("JumpTargetThen", "")),
        else_target=str(fields.get("JumpTargetElse", "")),
        target=str(fields.get("JumpTarget", "")),
    )


def _tensors(described: Any) -> tuple[str, ...]:
    if isinstance(described, str):
        return tuple(_TENSOR.findall(described))
    return tuple(str(tensor["Name"]) for tensor in described)
