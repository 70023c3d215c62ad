"""A lazy model on disk: what was decided about it, never its weights.

A folder holds ``lazy.json`` and, for learned gates, one safetensors file that ``lazy.json`` names by its content. The
JSON is replaced last and in one stroke, so an interrupted save leaves what was there before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import save as serialize
from torch import nn

from lazy_compile.config import LazyConfig
from lazy_compile.digests import DIGEST, check_digest, digest_of, verification, verifies
from lazy_compile.errors import ArtifactError, ConfigError, shown
from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.serialize import from_parts, to_parts
from lazy_compile.storage import (
    atomic_path,
    load_json,
    load_sealed_json,
    load_tensors,
    locked_folder,
    save_sealed_json,
    superseding,
)

FORMAT = 4
MANIFEST = "lazy.json"
GATES = "gates"
"""The entry of a policy that names the file of its tensors."""

_UNDO = "undo the edit, or make it again"

_TOP = {"format": int, "config": dict, "policy": dict, "model": dict, "branches": list}
_MODEL = {"fingerprint": str, "capture": str, "attempts": list, "guarded_inputs": list}
_BRANCH = {"name": str, "kind": str, "gate_features": int}


def fingerprint(model: nn.Module) -> str:
    """Identifies an architecture: SHA-256 over the sorted names and shapes of its parameters.

    The class plays no part, and neither do the weights: gates fit a fine-tuned model.
    """
    lines = sorted(f"{name} {list(parameter.shape)}" for name, parameter in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """What was decided about a lazy model.

    Attributes:
        config: the options of the transformation.
        policy: the rule that decides.
        fingerprint: see :func:`fingerprint`.
        capture: how the graph was obtained, and ``attempts`` what was tried before, with the reason that it failed.
        guarded_inputs: arguments whose values the graph depends on.
        branches: ``(name, kind, gate_features)`` of each, in order.
        directory: where it was read from; None before it is written.
    """

    config: LazyConfig
    policy: Policy
    fingerprint: str
    capture: str
    attempts: tuple[str, ...]
    guarded_inputs: tuple[str, ...]
    branches: tuple[tuple[str, str, int], ...]
    directory: Path | None = None

    def check_model(self, model: nn.Module) -> None:
        """
        Raises:
            ArtifactError: the parameters of ``model`` are not those of the model that this was made for.
        """
        seen = fingerprint(model)
        if seen != self.fingerprint:
            raise ArtifactError(
                f"{self.directory} was made for another model: it has fingerprint {self.fingerprint[:12]}, "
                f"{type(model).__name__} has {seen[:12]}; load it with the model it was calibrated on, or calibrate "
                "this one"
            )

    def check_branches(self, branches: Sequence[ResidualBranch]) -> None:
        """
        Raises:
            ArtifactError: other branches were found in the model than when this was made.
        """
        seen = describe(branches)
        for saved, found in zip(self.branches, seen, strict=False):
            if saved != found:
                raise ArtifactError(
                    f"{self.directory} was made for another model: its branch {saved[0]!r} is {saved[1]} with "
                    f"{saved[2]} gate features, here stands {found[0]!r}, {found[1]} with {found[2]}; calibrate again"
                )
        if len(seen) != len(self.branches):
            raise ArtifactError(
                f"{self.directory} was made for another model: it has {len(self.branches)} branches, "
                f"this one {len(seen)}; calibrate again"
            )


def describe(branches: Sequence[ResidualBranch]) -> tuple[tuple[str, str, int], ...]:
    return tuple((branch.name, branch.kind.value, branch.gate_features) for branch in branches)


def write(directory: str | Path, artifact: Artifact) -> None:
    """Write an artifact to a folder; other files in it stay.

    Raises:
        ConfigError: the policy cannot be written down, see :meth:`~lazy_compile.policies.policy.Policy.to_dict`.
        ArtifactError: the folder cannot be written to.
    """
    folder = Path(directory)
    policy, gates = _write_policy(artifact.policy)
    manifest = {
        "format": FORMAT,
        "config": asdict(artifact.config),
        "policy": policy,
        "model": {
            "fingerprint": artifact.fingerprint,
            "capture": artifact.capture,
            "attempts": list(artifact.attempts),
            "guarded_inputs": list(artifact.guarded_inputs),
        },
        "branches": [dict(zip(_BRANCH, branch, strict=True)) for branch in artifact.branches],
    }
    path = folder / MANIFEST
    with locked_folder(folder), superseding(path, _gates_of(path), gates):
        for name, content in gates.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(content)
        save_sealed_json(path, manifest)


def _gates_of(manifest: Path) -> set[str]:
    """The file of gates that a manifest names; none where there is no manifest that can be read."""
    with suppress(ArtifactError, KeyError, TypeError):
        name = load_sealed_json(manifest)["policy"]["gates"]
        return {name} if re.fullmatch(r"gates\.[0-9a-f]{16}\.safetensors", name) else set()
    return set()


def read(directory: str | Path, *, verify: bool = True) -> Artifact:
    """
    Args:
        directory: the folder.
        verify: False reads it without holding it against its digests.

    Raises:
        ArtifactError: a file is missing or damaged, or was edited into something that cannot be understood.
    """
    with verification(verify):
        return _read(Path(directory))


def _read(folder: Path) -> Artifact:
    path = folder / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{folder} holds no {MANIFEST}; expected a folder that calibrate, plan or save() wrote")
    values = load_json(path)
    version = values.get("format") if isinstance(values, dict) else None
    if version == 3:
        _from_last_format(values)
    elif version != FORMAT:
        raise ArtifactError(
            f"{path} has format {shown(version)}, this release reads {FORMAT}; make it again with this release"
        )
    _check({name: value for name, value in values.items() if name != DIGEST}, _TOP, path, "")
    _check(values["model"], _MODEL, path, "model.")
    for position, branch in enumerate(values["branches"]):
        _check(branch, _BRANCH, path, f"branches[{position}].")
        if branch["kind"] not in {kind.value for kind in BranchKind}:
            raise ArtifactError(f"{path}: branches[{position}].kind is {shown(branch['kind'])}; {_UNDO}")
        if not 0 <= branch["gate_features"] < 2**31:
            raise ArtifactError(f"{path}: branches[{position}].gate_features is out of range; {_UNDO}")
    branches = tuple(tuple(branch[key] for key in _BRANCH) for branch in values["branches"])
    artifact = Artifact(
        _read_config(values["config"], path),
        _read_policy(values["policy"], path, branches),
        values["model"]["fingerprint"],
        values["model"]["capture"],
        tuple(map(str, values["model"]["attempts"])),
        tuple(map(str, values["model"]["guarded_inputs"])),
        branches,
        folder,
    )
    if version == FORMAT:  # format 3 carried none
        check_digest(values, path)  # last, since the other checks say more about an edit
    return artifact


def _from_last_format(values: Any) -> None:
    """Format 3 left the features of a gate table to the branches."""
    policy, branches = values.get("policy"), values.get("branches")
    if isinstance(policy, dict) and policy.get("kind") == "learned" and isinstance(branches, list):
        policy["features"] = [item.get("gate_features") for item in branches if isinstance(item, dict)]


def _write_policy(policy: Policy) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the manifest says of a policy, and the file of its tensors, by name."""
    values, tensors = to_parts(policy)
    if GATES in values:
        raise ConfigError(f"a policy of class {type(policy).__name__} has a value {GATES!r}; name it otherwise")
    if not tensors:
        return values, {}
    content = serialize(dict(tensors))
    name = f"gates.{_digest(content)}.safetensors"
    return {**values, GATES: name}, {name: content}


def _digest(content: bytes) -> str:
    return digest_of(content)[:16]


def _read_policy(values: dict[str, Any], manifest: Path, branches: Sequence[tuple[str, str, int]]) -> Policy:
    values = dict(values)
    tensors = _read_tensors(values.pop(GATES), manifest) if GATES in values else {}
    policy = from_parts(values, tensors, str(manifest))
    try:
        policy.check([_stand_in(index, branch) for index, branch in enumerate(branches)])
    except ConfigError as error:
        raise ArtifactError(f"{manifest}: {error}; undo the edit, or make it again") from error
    return policy


def _read_tensors(name: Any, manifest: Path) -> dict[str, torch.Tensor]:
    path = manifest.parent / Path(str(name)).name
    tensors, _ = load_tensors(path, sealed=False)
    if verifies() and path.name != f"gates.{_digest(path.read_bytes())}.safetensors":
        raise ArtifactError(
            f"{path} is not what was saved: its content does not match its name; calibrate again, or restore it"
        )
    for tensor_name, tensor in tensors.items():
        if tensor.is_complex() or not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"{path}: {tensor_name} holds numbers that are not finite; calibrate again, or restore it"
            )
    return tensors


def _stand_in(index: int, described: tuple[str, str, int]) -> ResidualBranch:
    """What is known of a branch before the model is captured."""
    name, kind, features = described
    entry = BranchTensor("entry", (features,), "float32", None, 0, 0)
    return ResidualBranch(index, name, BranchKind(kind), "", 0, (entry,), (), row_separable=True)


def _read_config(values: dict[str, Any], manifest: Path) -> LazyConfig:
    hints = get_type_hints(LazyConfig)
    _check(values, hints, manifest, "config.")
    try:
        return LazyConfig(**values)
    except (ConfigError, TypeError) as error:
        raise ArtifactError(f"{manifest}: {error}; undo the edit, or make it again") from error


def _check(values: Any, expected: Mapping[str, Any], path: Path, prefix: str) -> None:
    """One object of the manifest: exactly these keys, each of its type."""
    if not isinstance(values, dict):
        raise ArtifactError(
            f"{path}: {prefix[:-1]} is {shown(values)}, expected an object; undo the edit, or make it again"
        )
    for key in sorted(expected.keys() ^ values.keys()):
        trouble = "lacks" if key in expected else "has an unknown key"
        raise ArtifactError(f"{path} {trouble} {shown(prefix + key)}; undo the edit, or make it again")
    for key, kind in expected.items():
        if not _is(values[key], kind):
            name = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise ArtifactError(
                f"{path}: {prefix + key} is {shown(values[key])}, expected {name}; undo the edit, or make it again"
            )


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_is(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind
