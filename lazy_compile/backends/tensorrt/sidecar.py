"""The JSON file beside an engine: what it takes and returns, how it was made, and what it consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lazy_compile.backends.onnx.metadata import KEY, OnnxMetadata
from lazy_compile.backends.tensorrt.check import EngineStructure, check_branches
from lazy_compile.backends.tensorrt.layers import EngineLayer
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.serialize import from_json
from lazy_compile.storage import load_json, save_json

FORMAT = 3
LAST_FORMAT = 2
"""It wrote the size of a schedule beside it."""


@dataclass(frozen=True)
class EngineSidecar:
    """An engine says nothing about itself without a GPU, and nothing about caches at all: this does.

    Attributes:
        flavor: which builder made it.
        version: of that builder; TensorRT runs an engine with no other one.
        device: the GPU that it was built on; empty if none was needed.
        key: what it was made from, a digest of the ONNX file, the options, the policy, the builder and the GPU.
        sha256: of the engine.
        options: of the build.
        tensors: inputs and outputs.
        model: the contract of the lazy model, without a policy; None if the ONNX file was not one.
        prologue: the digest of a prologue, by which its model knows it; empty if it is none.
        written_policy: the rule that its runner follows unless told otherwise, as
            :mod:`lazy_compile.policies.serialize` writes it.
        nodes: names of the heavy ONNX nodes by conditional, ``""`` for those in none.
        layers: what the builder made of it.
    """

    flavor: str
    version: str
    device: str
    key: str
    sha256: str
    options: dict[str, Any]
    tensors: tuple[EngineTensor, ...]
    model: OnnxMetadata | None
    prologue: str
    written_policy: dict[str, Any]
    nodes: dict[str, tuple[str, ...]]
    layers: tuple[EngineLayer, ...]

    @property
    def policy(self) -> Policy:
        """
        Raises:
            ArtifactError: it is of a kind that is not defined in this process, or damaged.
        """
        return from_json(self.written_policy, "the description of this engine")

    def structure(self) -> EngineStructure:
        """Where its kernels stand."""
        return check_branches(self.layers, len(self.nodes) - 1, self.nodes)

    def save(self, engine: Path) -> None:
        """
        Raises:
            ArtifactError: the folder cannot be written to.
        """
        values = {
            "format": FORMAT,
            "flavor": self.flavor,
            "version": self.version,
            "device": self.device,
            "key": self.key,
            "sha256": self.sha256,
            "options": self.options,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "model": None if self.model is None else json.loads(replace(self.model, policy=None).to_json()),
            "prologue": self.prologue,
            "policy": self.written_policy,
            "nodes": {place: list(names) for place, names in self.nodes.items()},
            "layers": [list(asdict(layer).values()) for layer in self.layers],
        }
        save_json(path_beside(engine), values)

    @classmethod
    def load(cls, engine: str | Path) -> EngineSidecar:
        """
        Raises:
            ArtifactError: it is missing, damaged, or of another release.
        """
        path = path_beside(Path(engine))
        if not path.is_file():
            raise ArtifactError(f"{engine} has no {path.name} beside it; copy both, or build the engine again")
        values = load_json(path)
        try:
            version, policy = values.pop("format"), values.pop("policy")
            if version not in (FORMAT, LAST_FORMAT):
                raise ValueError(f"its format is not {FORMAT}")
            if version == LAST_FORMAT and policy["kind"] == "scheduled":
                policy = {key: value for key, value in policy.items() if key not in ("steps", "branches")}
            values["written_policy"] = policy
            model = values["model"]
            values["model"] = None if model is None else OnnxMetadata.parse({KEY: json.dumps(model)})
            values["tensors"] = tuple(EngineTensor(**_tuples(item)) for item in values["tensors"])
            values["layers"] = tuple(EngineLayer(*map(_tuple, item)) for item in values["layers"])
            values["nodes"] = _tuples(values["nodes"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise ArtifactError(f"{path} is damaged ({error!r}); build the engine again") from error

    def check_file(self, engine: str | Path) -> bytes:
        """The engine.

        Raises:
            ArtifactError: it is missing, or not the one that this describes.
        """
        try:
            plan = Path(engine).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read {engine}: {error.strerror or error}; build it again") from error
        if digest(plan) != self.sha256:
            raise ArtifactError(
                f"{engine} is not the engine that {path_beside(Path(engine)).name} describes; copy both from one "
                "build, or build it again"
            )
        return plan


def path_beside(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in values.items()}
