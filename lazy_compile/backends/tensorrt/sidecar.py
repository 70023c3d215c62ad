"""The JSON file beside an engine: what it takes and returns, how it was made, and what it consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from lazy_compile.backends.onnx.metadata import KEY, OnnxMetadata
from lazy_compile.backends.onnx.metadata_schema import check_types
from lazy_compile.backends.tensorrt.check import EngineStructure, check_branches
from lazy_compile.backends.tensorrt.layers import EngineLayer
from lazy_compile.backends.tensorrt.network import EngineTensor
from lazy_compile.digests import DIGEST, check_digest, digest_of, digest_of_file, verifies
from lazy_compile.errors import ArtifactError, ConfigError, one_line
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.serialize import from_json
from lazy_compile.storage import load_json, regular_file, save_sealed_json

FORMAT = 4
LAST_FORMAT = 3
"""An engine had one profile at most."""

UNSEALED = 2
"""It wrote the size of a schedule beside it, and named the engine by SHA-256."""


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
    content: str
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
            "model": None if self.model is None else json.loads(replace(self.model, policy=None).to_json()),
            "prologue": self.prologue,
            "policy": self.written_policy,
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
            version, policy = values.pop("format"), values.pop("policy")
            if version not in (FORMAT, LAST_FORMAT, UNSEALED):
                raise ValueError(f"its format is not {FORMAT}")
            if version == UNSEALED and policy["kind"] == "scheduled":
                policy = {key: value for key, value in policy.items() if key not in ("steps", "branches")}
            if version == UNSEALED:
                values["content"] = values.pop("sha256")
            values["written_policy"] = policy
            model = values["model"]
            values["model"] = None if model is None else OnnxMetadata.parse({KEY: json.dumps(model)})
            if version != FORMAT:
                values["tensors"] = [_with_profiles(item) for item in values["tensors"]]
            values["tensors"] = tuple(EngineTensor(**_tuples(item)) for item in values["tensors"])
            values["layers"] = tuple(EngineLayer(*map(_tuple, item)) for item in values["layers"])
            values["nodes"] = _tuples(values["nodes"])
            sidecar = cls(**values)
            check_types(sidecar)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise ArtifactError(f"{path} is damaged ({one_line(repr(error))}); build the engine again") from error
        if version != UNSEALED:
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
        if verifies() and self.content not in (digest_of(plan), hashlib.sha256(plan).hexdigest()):
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


def _with_profiles(tensor: dict[str, Any]) -> dict[str, Any]:
    if "profile" not in tensor:
        return tensor
    rest = {name: value for name, value in tensor.items() if name != "profile"}
    return {**rest, "profiles": [tensor["profile"]] if tensor["profile"] else []}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in values.items()}
