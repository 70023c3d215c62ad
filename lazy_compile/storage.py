"""Files that are either complete or not there: atomic writes, and reads that say in one line what is wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lazy_compile.digests import RESTORE, new_digest, verifies, with_digest, without_digest
from lazy_compile.errors import ArtifactError, one_line, shown

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("lazy_compile")

MAX_JSON_BYTES = 256 * 2**20

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})\.partial")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder; it takes the final name when the block ends well, and vanishes otherwise.

    What a killed process left of an earlier attempt is removed.

    Raises:
        ArtifactError: the folder cannot be written to, or the disk is full.
    """
    final = Path(path)
    try:
        temporary = start_partial(final)
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


def start_partial(final: Path) -> Path:
    """An empty file beside ``final`` that says which process is at work on it, and under which token.

    Files of ended processes in this folder, and whatever they wrote under their token, are removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final.parent)
    # Not tempfile: its files are for the owner alone, and the final one would be too.
    temporary = final.with_name(f".{final.name}.{_HOST}-{os.getpid()}.{secrets.token_hex(4)}.partial")
    temporary.touch(exist_ok=False)
    return temporary


def token_of(temporary: Path) -> str:
    """Eight random digits in the name of a temporary path; names of files beside it that belong to it hold them too."""
    found = _PARTIAL.fullmatch(temporary.name)
    assert found is not None
    return found["token"]


def _remove_abandoned(folder: Path) -> None:
    for file in folder.glob(".*.partial"):
        found = _PARTIAL.fullmatch(file.name)
        if found is not None and found["host"] == _HOST and _is_gone(int(found["pid"])):
            for other in folder.glob(f"*.{found['token']}.*"):
                if other.is_dir():  # onnx_ir gathers weights in one
                    shutil.rmtree(other, ignore_errors=True)
                elif other != file:
                    other.unlink(missing_ok=True)
            file.unlink(missing_ok=True)  # last: it is what the others are found by


def _is_gone(pid: int) -> bool:
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _host() -> str:
    """Identifies the machine, and the container, in which the number of a process means something."""
    name = socket.gethostname()
    with suppress(OSError):
        name += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return f"{zlib.crc32(name.encode()):08x}"


_HOST = _host()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Of several processes and threads that put new files in the place of old ones in this folder, one at a time does.

    Who holds a folder may ask for it again.
    """
    held, key = _HELD.get(), os.path.realpath(folder)
    if fcntl is None or key in held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"cannot write to {folder}: {error.strerror or error}") from error
    token = _HELD.set(held | {key})
    try:
        with suppress(OSError):  # some file systems have no locks
            _lock(handle, folder)
        yield
    finally:
        _HELD.reset(token)
        os.close(handle)


_HELD: ContextVar[frozenset[str]] = ContextVar("lazy_compile_locked_folders", default=frozenset())


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that writes to %s", folder)
        fcntl.flock(handle, fcntl.LOCK_EX)


@contextmanager
def superseding(final: Path, older: Collection[str], newer: Collection[str] = ()) -> Iterator[None]:
    """Files that belong to one file are replaced with it: the older ones are removed when the block ends well.

    A note beside ``final`` names all of them meanwhile. Should the process end in between, the next one removes what
    its own files leave over.

    Args:
        final: the file that the others belong to; only its name counts, and its folder, which they lie in.
        older: names of those that belong to it now.
        newer: names of those that will.
    """
    note = final.with_name(f".{final.name}.files")
    noted = _noted(note)
    names = {*older, *newer, *noted}
    if names:
        save_sealed_json(note, {"files": sorted(names)})
    try:
        yield
    except BaseException:
        if not any((final.parent / name).exists() for name in noted | {*newer} - {*older}):
            note.unlink(missing_ok=True)
        raise
    if names:
        remove_files(final.parent, names - set(newer))
        note.unlink(missing_ok=True)


def _noted(note: Path) -> set[str]:
    with suppress(ArtifactError, KeyError, TypeError):
        return set(map(str, load_sealed_json(note)["files"]))
    return set()


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Remove files of this folder, and of no other, whatever their names say.

    Each goes before what describes it, whose name is longer: an engine that is there has its description.
    """
    for name in sorted(names):
        file = folder / name
        if Path(name).name == name and not file.is_dir():
            file.unlink(missing_ok=True)


def regular_file(path: Path, limit: int | None = None) -> Path:
    """The same path.

    Raises:
        ArtifactError: it is missing, no plain file, or of more than ``limit`` bytes.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {shown_path(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path} is no plain file; expected one that lazy_compile wrote")
    if limit is not None and found.st_size > limit:
        raise ArtifactError(f"{path} has {found.st_size} bytes, more than the {limit} that such a file may have")
    return path


def is_file(path: str | Path) -> bool:
    """Whether there is a file, whatever the path: one that is too long for a name is none."""
    with suppress(OSError):
        return Path(path).is_file()
    return False


def is_folder(path: str | Path) -> bool:
    """The same of folders."""
    with suppress(OSError):
        return Path(path).is_dir()
    return False


def shown_path(path: Path) -> str:
    """A path in a message; a long one by its end."""
    text = str(path)
    return one_line(text if len(text) <= 160 else f"...{text[-157:]}", 160)


def save_json(path: str | Path, values: Any) -> None:
    """Write plain JSON, for people and other tools."""
    with atomic_path(path) as temporary:
        temporary.write_text(_dump(values))


def save_sealed_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object that carries its digest."""
    with atomic_path(path) as temporary:
        temporary.write_text(_dump(with_digest(values)))


def _dump(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"


def load_json(path: str | Path, *, infinity: bool = False) -> Any:
    """
    Args:
        path: the file.
        infinity: whether a number may be infinite; none may be NaN.

    Raises:
        ArtifactError: the file is missing, or not JSON with finite numbers.
    """
    path = regular_file(Path(path), MAX_JSON_BYTES)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {path}: {shown(error)}; {_AGAIN}") from error
    return parse_json(text, path, infinity=infinity)


def load_sealed_json(path: str | Path, *, infinity: bool = False) -> Any:
    """What :func:`save_sealed_json` wrote, without its digest.

    Raises:
        ArtifactError: the file is missing, not JSON, or not what was written.
    """
    return without_digest(load_json(path, infinity=infinity), path)


def parse_json(text: str, where: str | Path, *, infinity: bool = False) -> Any:
    """The one place that JSON is read at.

    Raises:
        ArtifactError: it is not JSON, too deep, or holds a number that is not finite or too long.
    """
    try:
        return json.loads(text, parse_constant=_infinite if infinity else _refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot read {where}: {shown(error)}; {_AGAIN}") from error


_AGAIN = "make it again, or restore it from a copy"


def _refuse(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no finite number")


def _infinite(name: str) -> float:
    return _refuse(name) if name == "NaN" else float(name)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(shown(text))


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that carries its digest.

    All that it says about itself is one entry: safetensors writes several in an order that changes from run to run.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"metadata": dict(metadata or {}), "tensors": _digest_of_tensors(contiguous)}
    with atomic_path(path) as temporary:
        # It writes to a file of its own beside the one it is given, which would stay if the process ended.
        room = temporary.with_name(f".{Path(path).stem}.{token_of(temporary)}.tensors")
        room.mkdir()
        try:
            save_file(contiguous, room / "all", metadata={_ENTRY: json.dumps(with_digest(described), sort_keys=True)})
            os.replace(room / "all", temporary)
        except SafetensorError as error:
            raise ArtifactError(f"cannot write {path}: {shown(error)}") from error
        finally:
            shutil.rmtree(room, ignore_errors=True)


def load_tensors(path: str | Path, *, sealed: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`save_tensors` wrote.

    Args:
        path: the file.
        sealed: whether it carries its digest; False for one that is known by its name.

    Raises:
        ArtifactError: the file is missing, truncated, not a safetensors file, or not what was written.
    """
    regular_file(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            entry = (file.metadata() or {}).get(_ENTRY, "{}")
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError(f"cannot read {path}: {shown(error)}; {_AGAIN}") from error
    if not sealed:
        return tensors, {}
    described = without_digest(parse_json(entry, path), path)
    metadata = described.get("metadata", {}) if isinstance(described, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"{path} does not say what its tensors are; {_AGAIN}")
    if verifies() and described.get("tensors") != _digest_of_tensors(tensors):
        raise ArtifactError(f"{path} is not what was written: its digest does not match; {RESTORE}")
    return tensors, metadata


_ENTRY = "lazy_compile"


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    content = new_digest()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        if tensor.numel():
            content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return str(content.hexdigest())
