"""The JSON file beside an engine: what it takes and returns, how it was made, and what it consists of."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from lazy_compile.backends.onnx.metadata import KEY, OnnxMetadata
from lazy_compile.backends.onnx.metadata_schema import check_types
from lazy_compile.backends.tensorrt.check import EngineStructure, check_branches
from lazy_compile.backends.tensorrt.layers import EngineLayer
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.digests import DIGEST, check_digest, digest_of, digest_of_file, verifies
from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.policies.gate_table import GateTable
from lazy_compile.policies.policy import AlwaysCompute, Learned, Policy, Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.storage import load_json, regular_file, save_sealed_json

FORMAT = 2


@dataclass(frozen=True)
class EngineSidecar:
    """An engine says nothing about itself without a GPU, and nothing about caches at all: this does.

    Attributes:
        flavor: which builder made it.
        version: of that builder; TensorRT runs an engine with no other one.
        device: the GPU that it was built on; empty if none was needed.
        key: what it was made from, a digest of the ONNX file, the options, the policy, the builder and the GPU.
        content: the digest of the engine.
        options: of the build.
        tensors: inputs and outputs.
        model: the contract of the lazy model; None if the ONNX file was not one.
        prologue: the digest of a prologue, by which its model knows it; empty if it is none.
        policy: the rule that its runner follows unless told otherwise.
        nodes: names of the heavy ONNX nodes by conditional, ``""`` for those in none.
        layers: what the builder made of it.
    """

    flavor: str
    version: str
    device: str
    key: str
    content: str
    options: dict[str, Any]
    tensors: tuple[EngineTensor, ...]
    model: OnnxMetadata | None
    prologue: str
    policy: Policy
    nodes: dict[str, tuple[str, ...]]
    layers: tuple[EngineLayer, ...]

    def structure(self) -> EngineStructure:
        """Where its kernels stand."""
        return check_branches(self.layers, len(self.nodes) - 1, self.nodes)

    def save(self, engine: Path, waiting: Path | None = None) -> None:
        """
        Args:
            engine: that it stands beside.
            waiting: where to write it instead, see :func:`waiting_path`.

        Raises:
            ArtifactError: the folder cannot be written to.
        """
        values = {
            "format": FORMAT,
            "flavor": self.flavor,
            "version": self.version,
            "device": self.device,
            "key": self.key,
            "content": self.content,
            "options": self.options,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "model": None if self.model is None else json.loads(self.model.to_json()),
            "prologue": self.prologue,
            "policy": policy_to_json(self.policy),
            "nodes": {place: list(names) for place, names in self.nodes.items()},
            "layers": [list(asdict(layer).values()) for layer in self.layers],
        }
        save_sealed_json(path_beside(engine) if waiting is None else waiting, values)

    @classmethod
    def load(cls, engine: str | Path) -> EngineSidecar:
        """
        Raises:
            ArtifactError: it is missing, damaged, or of another release.
        """
        path = _find(Path(engine))
        written = load_json(path, infinity=True)
        try:
            values = {name: value for name, value in written.items() if name != DIGEST}
            if values.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            model = values["model"]
            values["model"] = None if model is None else OnnxMetadata.parse({KEY: json.dumps(model)})
            values["policy"] = policy_from_json(values["policy"])
            values["tensors"] = tuple(EngineTensor(**_tuples(item)) for item in values["tensors"])
            values["layers"] = tuple(EngineLayer(*map(_tuple, item)) for item in values["layers"])
            values["nodes"] = _tuples(values["nodes"])
            sidecar = cls(**values)
            check_types(sidecar)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError, SafetensorError) as error:
            raise ArtifactError(f"{path} is damaged ({one_line(repr(error))}); build the engine again") from error
        check_digest(written, path)
        return sidecar

    def check_file(self, engine: str | Path) -> bytes:
        """The engine.

        Raises:
            ArtifactError: it is missing, or not the one that this describes.
        """
        try:
            plan = regular_file(Path(engine)).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read {engine}: {error.strerror or error}; build it again") from error
        if verifies() and digest_of(plan) != self.content:
            raise ArtifactError(
                f"{engine} is not the engine that {path_beside(Path(engine)).name} describes; copy both from one "
                "build, or build it again"
            )
        return plan


def path_beside(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def waiting_path(engine: Path, content: str) -> Path:
    """Where the description of a new engine lies while the engine takes the place of an older one.

    Should the process end in between, either engine still finds its own description.
    """
    return engine.with_name(f".{engine.name}.{content[:16]}.json")


def _find(engine: Path) -> Path:
    """
    Raises:
        ArtifactError: the engine has no description.
    """
    if engine.is_file() and list(engine.parent.glob(f".{escape(engine.name)}.{'?' * 16}.json")):
        waiting = waiting_path(engine, digest_of_file(engine))
        if waiting.is_file():
            return waiting
    path = path_beside(engine)
    if not path.is_file():
        raise ArtifactError(f"{engine} has no {path.name} beside it; copy both, or build the engine again")
    return path


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """
    Raises:
        ConfigError: it is of a class that an engine cannot follow.
    """
    if type(policy) is AlwaysCompute:
        return {"kind": "always_compute"}
    if type(policy) is Scheduled:
        return {"kind": "scheduled", **policy.schedule.to_json()}
    if type(policy) is Learned:
        table = policy.table
        packed = write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in table.tensors.items()})
        return {
            "kind": "learned",
            "shift": policy.shift,
            "delayed": policy.delayed,
            "features": list(table.features),
            "interpolation": table.interpolation,
            "tensors": base64.b64encode(packed).decode(),
        }
    raise ConfigError(f"an engine cannot follow {policy!r}; expected AlwaysCompute(), Scheduled(...) or Learned(...)")


def policy_from_json(values: Mapping[str, Any]) -> Policy:
    kind = values["kind"]
    if kind == "scheduled":
        return Scheduled(CacheSchedule.from_json(values))
    if kind == "learned":
        tensors = read_tensors(base64.b64decode(values["tensors"]))
        table = GateTable(tuple(values["features"]), **tensors, interpolation=values["interpolation"])
        return Learned(table, values["shift"], values["delayed"])
    if kind != "always_compute":
        raise ValueError(f"its policy is {kind!r}")
    return AlwaysCompute()


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in values.items()}
