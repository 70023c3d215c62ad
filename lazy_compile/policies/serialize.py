"""Policies in files: the one place that writes and reads them.

A policy says itself what it is made of, see :meth:`~lazy_compile.policies.policy.Policy.to_dict`. Here its ``kind`` is
added, and tensors are packed where a file is nothing but JSON. A kind is looked up among the classes that are defined
in this process: no module is ever imported because a file names it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from lazy_compile.errors import ArtifactError, ConfigError, one_line, shown
from lazy_compile.policies.learned import Learned
from lazy_compile.policies.policy import AlwaysCompute, Policy, Scheduled
from lazy_compile.policies.presets import EveryNth

KIND = "kind"
TENSORS = "tensors"

BUILT_IN = tuple(policy.kind for policy in (AlwaysCompute, Scheduled, Learned, EveryNth))


def to_parts(policy: Policy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``{"kind": ..., **values}`` that JSON can hold, and tensors.

    Raises:
        ConfigError: the policy cannot be written down.
    """
    values, tensors = policy.to_dict()
    for key, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{key!r} of a policy of class {type(policy).__name__} cannot be written as JSON ({error}); define "
                "to_dict() and from_dict() in it"
            ) from error
    if reserved := sorted({KIND, TENSORS} & values.keys()):
        raise ConfigError(f"a policy of class {type(policy).__name__} has a value {reserved[0]!r}; name it otherwise")
    return {KIND: policy.kind, **values}, packable(tensors)


def from_parts(values: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Policy:
    """
    Args:
        values: what :func:`to_parts` returned, with the kind.
        tensors: of the policy, by name.
        where: who holds it, for the error.

    Raises:
        ArtifactError: its kind is not defined in this process, or it was edited into something that is no such policy.
    """
    kind = values.get(KIND)
    if not isinstance(kind, str) or kind not in Policy.kinds:
        module = kind.partition(":")[0] if isinstance(kind, str) and ":" in kind else "the module that defines it"
        raise ArtifactError(
            f"{where} names the policy {shown(kind, 60)}; expected one of {', '.join(BUILT_IN)}, or one of your own: "
            f"import {one_line(module, 60)} before, since a file imports nothing by itself"
        )
    try:
        return Policy.kinds[kind].from_dict({key: value for key, value in values.items() if key != KIND}, tensors)
    except ConfigError as error:
        raise ArtifactError(f"{where}: {error}; undo the edit, or make it again") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise ArtifactError(
            f"{where} holds no policy {shown(kind)} ({shown(error)}); undo the edit, or make it again"
        ) from error


def to_json(policy: Policy) -> dict[str, Any]:
    """All of a policy as JSON: its tensors are a safetensors file in base64.

    Raises:
        ConfigError: the policy cannot be written down.
    """
    values, tensors = to_parts(policy)
    return {**values, TENSORS: base64.b64encode(pack(tensors)).decode()} if tensors else values


def from_json(values: Any, where: str) -> Policy:
    """
    Args:
        values: what :func:`to_json` returned.
        where: who holds it, for the error.

    Raises:
        ArtifactError: see :func:`from_parts`.
    """
    if not isinstance(values, dict):
        raise ArtifactError(f"{where} holds {shown(values)} for a policy, expected an object; make it again")
    try:
        tensors = unpack(base64.b64decode(values[TENSORS])) if TENSORS in values else {}
    except (SafetensorError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{where}: the tensors of its policy are damaged ({shown(error)}); make it again"
        ) from error
    return from_parts({key: value for key, value in values.items() if key != TENSORS}, tensors, where)


def packable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
