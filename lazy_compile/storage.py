"""Files that are either complete or not there: atomic writes, and reads that say what is wrong with a file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lazy_compile.errors import ArtifactError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder; it takes the final name when the block ends well, and vanishes otherwise.

    Raises:
        ArtifactError: the folder cannot be written to, or the disk is full.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are for the owner alone, and the final one would be too.
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
        temporary.touch(exist_ok=False)
        permissions = temporary.stat().st_mode
    except OSError as error:
        raise ArtifactError(f"cannot write {final}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(permissions)  # a writer that replaces the file, as safetensors does, may have narrowed them
        os.replace(temporary, final)
    except OSError as error:
        raise ArtifactError(f"cannot write {final}: {error.strerror or error}; nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, values: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def load_json(path: str | Path) -> Any:
    """
    Raises:
        ArtifactError: the file is missing, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; make it again, or restore it from a copy") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise ArtifactError(f"cannot write {path}: {error}") from error


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ArtifactError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; make it again, or restore it from a copy") from error
