"""A folder of models, one for each distinct row of a schedule, with one copy of the weights."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from lazy_compile.backends.onnx.sealed_file import seal_of
from lazy_compile.digests import RangeDigests, check_digest, digest_of, digest_of_file, verifies
from lazy_compile.errors import ArtifactError, import_optional, one_line, shown
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.storage import (
    is_file,
    load_json,
    load_sealed_json,
    locked_folder,
    remove_files,
    save_sealed_json,
    start_partial,
    superseding,
    token_of,
)

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
    def of(cls, schedule: CacheSchedule, folder: Path, suffix: str = ".onnx", token: str = "") -> ScheduleVariants:
        """Names for a new set: with another token than an older set has, both can lie in one folder."""
        token = token or secrets.token_hex(4)
        masks = dict.fromkeys(tuple(map(bool, row)) for row in schedule.should_compute)
        return cls(schedule, {mask: folder / f"mask-{_hexadecimal(mask)}.{token}{suffix}" for mask in masks})

    def save(self, folder: Path, companions: Collection[str] = ()) -> int:
        """Write the manifest, with which this set takes the place of an older one; then remove the files of that.

        Args:
            folder: of the set.
            companions: names of other files that belong to it.

        Returns:
            The bytes of the manifest.
        """
        names = {_hexadecimal(mask): file.name for mask, file in self.files.items()}
        values = {
            **self.schedule.to_json(),
            "files": names,
            "companions": sorted(companions),
            "digests": {file.name: _content(file) for file in self.files.values()},
        }
        path = folder / MANIFEST
        with (
            locked_folder(folder),
            superseding(path, _listed(path), _with_descriptions([*names.values(), *companions])),
        ):
            save_sealed_json(path, values)
            return path.stat().st_size

    @classmethod
    def load(cls, folder: str | Path) -> ScheduleVariants:
        """
        Raises:
            ArtifactError: the folder holds no manifest, or a file of it is missing or not the one that it names.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ArtifactError(f"{folder} holds no {MANIFEST}; export with gating='schedule' to this folder")
        values = load_json(path)
        schedule = CacheSchedule.from_json(values)
        found = cls.of(schedule, path.parent)
        try:
            names = {mask: str(values["files"][_hexadecimal(mask)]) for mask in found.files}
            digests = dict(values["digests"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({one_line(repr(error))}); export again") from error
        for name in names.values():
            file = path.parent / name
            if Path(name).name != name or not is_file(file):
                raise ArtifactError(f"{path} names {shown(name)}, which is missing; export again")
            if verifies() and _content(file) != digests.get(name):
                raise ArtifactError(f"{file} is not the file that {MANIFEST} names; copy all of one export")
        check_digest(values, path)
        return replace(found, files={mask: path.parent / name for mask, name in names.items()})


def _content(file: Path) -> str:
    """The digest that a file carries, which its reader holds against it; of one that carries none, its own."""
    return seal_of(file) or digest_of_file(file)


def _listed(manifest: Path) -> set[str]:
    """The files of a set, descriptions of engines too; none where there is no manifest that can be read."""
    names: set[str] = set()
    with suppress(ArtifactError, KeyError, TypeError, AttributeError):
        values: Any = load_sealed_json(manifest)
        names = _with_descriptions(map(str, [*values["files"].values(), *values["companions"]]))
    return names


def _with_descriptions(names: Iterable[str]) -> set[str]:
    """Names of files; an engine has its description beside it."""
    return {name for file in names for name in ((file, f"{file}.json") if file.endswith(".engine") else (file,))}


class SharedWeights:
    """Moves the weights of several models into one file, each different one once.

    As a context it removes its file again if the block fails, and all files that were written under its token.

    Attributes:
        token: eight digits that the names of all files of one set have in common.
        places: digests of the weights by their place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = ""
        self.places = RangeDigests()
        self._at: dict[str, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None
        self._partial: Path | None = None

    @property
    def name(self) -> str:
        return f"weights.{self.token}.data"

    def __enter__(self) -> SharedWeights:
        try:
            self._partial = start_partial(self.folder / MANIFEST)
            self.token = token_of(self._partial)
            self._file = (self.folder / self.name).open("wb")
        except OSError as error:
            raise ArtifactError(f"cannot write {self.folder / self.name}: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._file is not None
        assert self._partial is not None
        self._file.close()
        if kind is not None:
            remove_files(self.folder, {file.name for file in self.folder.glob(f"*.{self.token}.*")})
        self._partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            path = self.folder / self.name
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}; nothing was left behind")

    def take(self, model: Model) -> None:
        """Let a model read its weights from the shared file."""
        ir = import_optional("onnx_ir", "onnx")
        assert self._file is not None
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALLEST:
                continue
            content = tensor.tobytes()
            digest = digest_of(content)
            if digest not in self._at:
                self._file.write(bytes(-self._file.tell() % ALIGNMENT))
                self._at[digest] = self._file.tell(), len(content)
                self._file.write(content)
                self.places.note(self.folder / self.name, *self._at[digest], digest)
            offset, length = self._at[digest]
            value.const_value = ir.ExternalTensor(
                self.name, offset, length, tensor.dtype, shape=tensor.shape, name=str(value.name),
                base_dir=self.folder,
            )  # fmt: skip
        self._file.flush()


SMALLEST = 1024
"""Bytes; smaller weights stay in each model."""

ALIGNMENT = 4096
"""Bytes; what memory mapping asks of an offset."""


def _hexadecimal(mask: Iterable[bool]) -> str:
    bits = "".join("1" if computes else "0" for computes in mask)
    return f"{int(bits, 2):0{(len(bits) + 3) // 4}x}"
