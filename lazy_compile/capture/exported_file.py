"""Files of ``torch.export.save`` (``.pt2``), looked into before torch reads them: torch unpickles what they hold."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lazy_compile.capture.written_guards import check_guard, check_size
from lazy_compile.errors import ArtifactError, shown
from lazy_compile.storage import parse_json, regular_file
from lazy_compile.tree_specs import check_tree_spec

MAX_MEMBERS = 100_000

_PLAIN = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)|extra/[\w.-]+"
    r"|data/(weights/weight_\d+|constants/tensor_\d+|weights/\w+_config\.json|constants/\w+_config\.json)"
    r"|data/sample_inputs/[\w.-]+\.pt|models/[\w.-]+\.json)"
)
"""What an archive of one exported program holds. Compiled code and scripted objects are none of it."""

_TARGET = re.compile(r"(torch\.ops\.|_operator\.|operator\.|math\.|torch\.sym_|torch\._higher_order_ops\.|#)[\w.:]+")

_LEAVES = (torch.Tensor, int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """
    Raises:
        ArtifactError: it is not a file of ``torch.export.save``, or holds more than a graph and tensors.
    """
    check_exported(path)
    log = logging.getLogger("torch.export")
    before = log.disabled
    try:
        log.disabled = True  # it writes a traceback of its own
        return torch.export.load(path)
    except Exception as error:  # torch raises whatever its reader trips over
        raise _unreadable(path, error) from error
    finally:
        log.disabled = before


def check_exported(path: Path) -> None:
    """Look at every member of an archive without running any of it; for the errors see :func:`load_exported`."""
    regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MAX_MEMBERS:
                raise ArtifactError(f"{path} has {len(members)} members, more than {MAX_MEMBERS}; it was refused")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:  # so that nothing is larger than it looks
                    raise _refused(path, member.filename, "is compressed, as torch writes none")
            pickled = set(_pickled(archive, members, path))
            for member in members:
                _check_member(archive, member, path, member.filename in pickled)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"cannot read {path} ({type(error).__name__}: {shown(error)}); write it again with torch.export.save"
    )


def _refused(path: Path, name: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path} was refused: its member {shown(name, 60)} {why}; write it again with torch.export.save, from a model "
        "whose constants and inputs are tensors"
    )


def _pickled(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], path: Path) -> Iterator[str]:
    """Weights and constants that torch would unpickle."""
    for member in members:
        if not member.filename.endswith("_config.json"):
            continue
        listed = parse_json(archive.read(member).decode(), path)
        entries = listed.get("config") if isinstance(listed, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise _refused(path, member.filename, "lists no tensors")
        folder = member.filename.rpartition("/")[0]
        for entry in entries.values():
            if entry.get("use_pickle"):
                yield f"{folder}/{entry.get('path_name')}"


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, pickled: bool) -> None:
    name = member.filename
    if not _PLAIN.fullmatch(name):
        raise _refused(path, name, "is no part of an exported program of tensors")
    if pickled or name.endswith(".pt"):
        try:
            value = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
        except Exception as error:  # pickle's, of any kind
            raise _refused(path, name, "is pickled and holds more than tensors") from error
        if not all(isinstance(leaf, _LEAVES) for leaf in pytree.tree_leaves(value)):
            raise _refused(path, name, "is pickled and holds more than tensors")
    elif "/models/" in name:
        _check_graph(parse_json(archive.read(member).decode(), path, infinity=True), path, name)


def _check_graph(program: Any, path: Path, name: str) -> None:
    """Operators of torch alone, signatures that name nothing to import, and sizes and guards that torch evaluates."""
    waiting = [program]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            target = value.get("target")
            if "inputs" in value and isinstance(target, str) and not _TARGET.fullmatch(target):
                raise _refused(path, name, f"calls {shown(target, 60)}, which is no operator of torch")
            for key in ("in_spec", "out_spec"):
                if isinstance(text := value.get(key), str):
                    check_tree_spec(text, str(path))
            if "expr_str" in value:
                check_size(value["expr_str"], str(path))
            for guard in value.get("guards_code") or ():
                check_guard(guard, str(path))
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, str) and value.startswith("[1, {"):
            check_tree_spec(value, str(path))
