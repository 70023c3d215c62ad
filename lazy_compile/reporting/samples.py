"""The arrays beside a summary, read without trusting what the archive says of its size."""

from __future__ import annotations

import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ArtifactError, shown
from lazy_compile.storage import regular_file

MAX_BYTES = 64 * 2**20
"""Of all arrays together, unpacked."""

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_samples(path: Path) -> dict[str, npt.NDArray[Any]]:
    """What ``numpy.savez`` wrote, by name; nothing if there is no such file.

    Raises:
        ArtifactError: it is damaged, too large once unpacked, or holds something else than numbers and text.
    """
    if not path.exists():
        return {}
    try:
        with zipfile.ZipFile(regular_file(path)) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > MAX_BYTES:
                raise ValueError(f"it unpacks to {size} bytes, more than {MAX_BYTES}")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise ArtifactError(f"cannot read {path} ({shown(e)}); run the demo again, or delete it") from e


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(member) as file:
        stream: IO[bytes] = file
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{shown(member.filename)} has format {version}")
        shape, in_columns, dtype = _HEADERS[version](stream)
        if dtype.kind not in "biufU" or any(size < 0 for size in shape):
            raise ValueError(f"{shown(member.filename)} holds {dtype} of {shape}, which no report shows")
        content = stream.read()
        if prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"{shown(member.filename)} holds {len(content)} bytes for {dtype} of {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")
