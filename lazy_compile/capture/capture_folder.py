"""Captures that are kept on disk, so that another process starts without one."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.captured import Capture
from lazy_compile.capture.comparison import Verdict
from lazy_compile.capture.evaluation import first_line
from lazy_compile.capture.model_key import capture_key
from lazy_compile.capture.written_captures import read_capture, write_capture
from lazy_compile.capture.written_sizes import Unwritable
from lazy_compile.digests import digest_of
from lazy_compile.errors import ArtifactError, LazyCompileError
from lazy_compile.storage import load_tensors, parse_json, save_tensors

logger = logging.getLogger("lazy_compile")

CACHE_DIR = "LAZY_COMPILE_CACHE_DIR"
"""The environment variable that names a folder for captures."""

MOST_LOOKED_AT = 8
"""Entries of other sizes that are looked into, the newest first."""


@dataclass(frozen=True)
class CaptureFolder:
    """A folder of captures. What lies in it may be deleted at any time.

    Each is a safetensors file that carries its digest, in a folder that is named by all that the graph depends on but
    the sizes of the call; its own name says those. Nothing in it is pickled or evaluated, and weights are not in it.
    """

    path: Path

    @classmethod
    def chosen(cls, path: str | Path | None = None) -> CaptureFolder | None:
        """The one given, or that of the environment; None if there is neither."""
        found = path or os.environ.get(CACHE_DIR)
        return cls(Path(found).expanduser()) if found else None

    def entries(self, model: nn.Module, layout: CallLayout, tensors: Sequence[Tensor], *options: Any) -> KeptCaptures:
        """Those of a model for calls like this one."""
        try:
            key = capture_key(model, layout, tensors, *options)
        except Exception as error:  # whatever an object raises that is looked at
            logger.info("captures of %s are not kept: %s", type(model).__name__, first_line(error))
            key = ""
        name = re.sub(r"\W", "_", type(model).__name__)[:80]
        return KeptCaptures(self.path / f"{name}-{key[:40]}" if key else None, model, tuple(tensors))


@dataclass(frozen=True)
class KeptCaptures:
    """What is kept for one model and one kind of call.

    Attributes:
        folder: where; None if nothing can be kept.
        tensors: of the call.
    """

    folder: Path | None
    model: nn.Module
    tensors: tuple[Tensor, ...]

    def find(self, verdict_on: Callable[[Capture], Verdict]) -> Capture | None:
        """A capture that serves the call and does what the model does: bit for bit, if it did so when it was made.

        Args:
            verdict_on: compares a capture with the model.
        """
        for file in self._files():
            try:
                found, trouble = self._read(file), ""
                if not found.accepts(self.tensors):
                    continue
                verdict = verdict_on(found)
                trouble = verdict.mismatch or ("" if verdict.is_exact or not found.is_exact else _NOT_EXACT)
            except Exception as error:  # whatever a damaged file makes torch or sympy raise
                trouble = str(error) if isinstance(error, LazyCompileError) else first_line(error)
            if not trouble:
                logger.info("%s: its capture was read from %s", self._name, file)
                return found
            logger.warning("the capture of %s in %s is made anew: %s", self._name, file, trouble)
            with suppress(OSError):  # others may own the folder
                file.unlink()
        return None

    def keep(self, found: Capture) -> None:
        """Write a capture, if it can be written; that it cannot is no error."""
        if self.folder is None:
            return
        try:
            written, tensors = write_capture(found, self.model)
            text = _text(written)
            if _text(write_capture(read_capture(json.loads(text), tensors, self.model, "it"), self.model)[0]) != text:
                raise Unwritable("it does not read as it was written")
            save_tensors(self._file, tensors, {"capture": text})
        except Unwritable as error:
            logger.info("the capture of %s is not kept: %s", self._name, error)
        except ArtifactError as error:
            logger.warning("the capture of %s is not kept: %s", self._name, error)
        except Exception as error:  # the capture is none the worse for it
            logger.info("the capture of %s is not kept: %s", self._name, first_line(error))
        else:
            logger.info("the capture of %s is kept in %s", self._name, self._file)

    def _read(self, file: Path) -> Capture:
        tensors, described = load_tensors(file)
        return read_capture(parse_json(described["capture"], file), tensors, self.model, str(file))

    def _files(self) -> Iterator[Path]:
        """The one of the sizes of this call, then others."""
        if self.folder is None:
            return
        others = [file for file in self.folder.glob(f"*{_SUFFIX}") if file != self._file]
        if self._file.exists():
            yield self._file
        yield from sorted(others, key=_age)[:MOST_LOOKED_AT]

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        sizes = ";".join("x".join(map(str, tensor.shape)) for tensor in self.tensors)
        return self.folder / f"{digest_of(sizes.encode())[:16]}{_SUFFIX}"

    @property
    def _name(self) -> str:
        return type(self.model).__name__


_SUFFIX = ".safetensors"
_NOT_EXACT = "its graph returned the same bits as the model when it was captured, and does not now"


def _text(written: Any) -> str:
    return json.dumps(written, separators=(",", ":"))


def _age(file: Path) -> float:
    try:
        return -file.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0
