"""Content digests: what identifies a file, or the part of it that is read, and whether it is as it was written.

A digest finds damage, mix-ups and edits. It is no signature: whoever can write a file can write its digest too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazy_compile.errors import ArtifactError

DIGEST = "digest"
"""The entry of a JSON object that holds the digest of all others."""

CHUNK = 2**20

_VERIFIES: ContextVar[bool] = ContextVar("lazy_compile_verifies", default=True)


def new_digest() -> Any:
    """A hash object; 256 bits of BLAKE2b, which is about as fast as a disk."""
    return hashlib.blake2b(digest_size=32)


def digest_of(*parts: bytes | memoryview | bytearray) -> str:
    """Hexadecimal, 64 digits, over the parts one after the other."""
    content = new_digest()
    for part in parts:
        content.update(part)
    return str(content.hexdigest())


def digest_of_file(path: Path, start: int = 0, length: int | None = None) -> str:
    """Over a file, or ``length`` bytes of it; read in pieces.

    Raises:
        ArtifactError: it cannot be read, or ends before.
    """
    content, left = new_digest(), length
    try:
        with path.open("rb") as file:
            file.seek(start)
            while left is None or left:
                piece = file.read(CHUNK if left is None else min(CHUNK, left))
                if not piece:
                    break
                content.update(piece)
                left = None if left is None else left - len(piece)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if left:
        raise ArtifactError(f"{path} ends {left} bytes early; make it again, or restore it from a copy")
    return str(content.hexdigest())


@dataclass
class RangeDigests:
    """Digests of parts of files, each read once; for files that many models share."""

    _known: dict[tuple[Path, int, int], str] = field(default_factory=dict)

    def note(self, path: Path, start: int, length: int, digest: str) -> None:
        """What is known from writing it."""
        self._known[path, start, length] = digest

    def of(self, path: Path, start: int, length: int) -> str:
        place = path, start, length
        if place not in self._known:
            self._known[place] = digest_of_file(*place)
        return self._known[place]


def digest_of_json(values: Mapping[str, Any]) -> str:
    """Over the values, whatever the order and the white space in a file."""
    others = {name: value for name, value in values.items() if name != DIGEST}
    return digest_of(json.dumps(others, sort_keys=True, separators=(",", ":")).encode())


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that carries the digest of its other entries."""
    return {**values, DIGEST: digest_of_json(values)}


def check_digest(values: Any, path: str | Path) -> None:
    """
    Raises:
        ArtifactError: the entries of a JSON object are not those that :func:`with_digest` was given.
    """
    seen = values.get(DIGEST) if isinstance(values, dict) else None
    if verifies() and (seen is None or seen != digest_of_json(values)):
        what = "carries no digest" if seen is None else "is not what was written: its digest does not match"
        raise ArtifactError(f"{path} {what}; {RESTORE}")


def without_digest(values: Any, path: str | Path) -> Any:
    """The entries of a JSON object that :func:`with_digest` made; for the errors see :func:`check_digest`."""
    check_digest(values, path)
    return {name: value for name, value in values.items() if name != DIGEST} if isinstance(values, dict) else values


RESTORE = "make it again, restore it from a copy, or read it as it is with --no-verify (verify=False)"


def verifies() -> bool:
    """Whether files are held against their digests here."""
    return _VERIFIES.get()


@contextmanager
def verification(verify: bool) -> Iterator[None]:
    """With False, files that are read in this context are not held against their digests."""
    token = _VERIFIES.set(_VERIFIES.get() and verify)
    try:
        yield
    finally:
        _VERIFIES.reset(token)
