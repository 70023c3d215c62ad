"""A folder of models, one for each distinct row of a schedule, with one copy of the weights."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from lazy_compile.errors import ArtifactError, import_optional
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.storage import load_json, save_json

if TYPE_CHECKING:
    from onnx_ir import Model

MANIFEST = "schedule.json"

Mask = tuple[bool, ...]
"""Decisions of one step, True where a branch computes."""


@dataclass(frozen=True)
class ScheduleVariants:
    """A schedule, and the file that runs each of its distinct rows; equal rows share one.

    Attributes:
        schedule: the table.
        files: by mask, in the order in which a trajectory first needs them.
    """

    schedule: CacheSchedule
    files: dict[Mask, Path]

    @classmethod
    def of(cls, schedule: CacheSchedule, folder: Path, suffix: str = ".onnx") -> ScheduleVariants:
        masks = dict.fromkeys(tuple(map(bool, row)) for row in schedule.should_compute)
        return cls(schedule, {mask: folder / f"mask-{_hexadecimal(mask)}{suffix}" for mask in masks})

    def save(self, folder: Path, keep: Collection[str] = ()) -> None:
        """Write the manifest, then remove what an earlier set left in the folder; ``keep`` names other files of it."""
        names = {_hexadecimal(mask): file.name for mask, file in self.files.items()}
        save_json(folder / MANIFEST, {**self.schedule.to_json(), "files": names})
        for file in _of_a_set(folder):
            if file.name not in names.values() and file.name.removesuffix(".json") not in (*names.values(), *keep):
                file.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> ScheduleVariants:
        """
        Raises:
            ArtifactError: the folder holds no manifest, or a file of it is missing.
        """
        root = Path(folder)
        if not (root / MANIFEST).is_file():
            raise ArtifactError(f"{root} holds no {MANIFEST}; export with gating='schedule' to this folder")
        values = load_json(root / MANIFEST)
        schedule = CacheSchedule.from_json(values)
        found = cls.of(schedule, root)
        try:
            files = {mask: root / Path(values["files"][_hexadecimal(mask)]).name for mask in found.files}
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{root / MANIFEST} is damaged ({error!r}); export again") from error
        for file in files.values():
            if not file.is_file():
                raise ArtifactError(f"{root / MANIFEST} names {file.name}, which is missing; export again")
        return cls(schedule, files)


class SharedWeights:
    """Moves the weights of several models into one file, each different one once.

    As a context it removes its file again if the block fails.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"weights.{secrets.token_hex(4)}.data"
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def __enter__(self) -> SharedWeights:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()
        if kind is not None:
            self.path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ArtifactError(f"cannot write {self.path}: {error.strerror or error}; nothing was left behind")

    def take(self, model: Model) -> None:
        """Let a model read its weights from the shared file."""
        ir = import_optional("onnx_ir", "onnx")
        assert self._file is not None
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALLEST:
                continue
            content = tensor.tobytes()
            digest = hashlib.sha256(content).digest()
            if digest not in self._places:
                self._file.write(bytes(-self._file.tell() % ALIGNMENT))
                self._places[digest] = self._file.tell(), len(content)
                self._file.write(content)
            offset, length = self._places[digest]
            value.const_value = ir.ExternalTensor(
                self.name, offset, length, tensor.dtype, shape=tensor.shape, name=str(value.name),
                base_dir=self.path.parent,
            )  # fmt: skip
        self._file.flush()


SMALLEST = 1024
"""Bytes; smaller weights stay in each model."""

ALIGNMENT = 4096
"""Bytes; what memory mapping asks of an offset."""


def _hexadecimal(mask: Iterable[bool]) -> str:
    bits = "".join("1" if computes else "0" for computes in mask)
    return f"{int(bits, 2):0{(len(bits) + 3) // 4}x}"


def _of_a_set(folder: Path) -> list[Path]:
    return [*folder.glob("mask-*"), *folder.glob("weights.*.data"), *folder.glob("prologue.*")]
