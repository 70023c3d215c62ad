"""Rows of a measurement that takes long: each is written as soon as it is there, and none is measured twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from lazy_compile.errors import ArtifactError, shown
from lazy_compile.storage import load_json, save_json

logger = logging.getLogger("lazy_compile.bench")

Row = TypeVar("Row")


class RowFile(Generic[Row]):
    """Rows in a file of the form ``{"settings": ..., "rows": [...]}``; a run that was stopped goes on where it was.

    Several may share a file, under names of their own.

    Args:
        path: None keeps them in memory alone.
        kind: the dataclass of a row.
        key: the fields that say which row it is.
        settings: what else a row depends on; a file of other settings is begun anew.
        name: of the rows in the file.
    """

    def __init__(
        self, path: Path | None, kind: type[Row], key: Sequence[str], settings: Mapping[str, Any], name: str = "rows"
    ) -> None:
        self._path, self._key, self.settings, self._name = path, tuple(key), dict(settings), name
        self.rows: list[Row] = []
        names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
        try:
            found = self._found().get(name, [])
            if all(row.keys() == names for row in found):
                self.rows = [kind(**row) for row in found]
        except (TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} holds no rows ({shown(error)}); delete it to measure them anew") from error

    def get(self, measure: Callable[[], Row], **key: Any) -> Row:
        """The row of this key, measured if it is not there."""
        known = [row for row in self.rows if all(getattr(row, name) == key[name] for name in self._key)]
        if known:
            return known[0]
        row = measure()
        self.rows.append(row)
        logger.info("measured %s", ", ".join(f"{name} {value}" for name, value in key.items()))
        if self._path is not None:
            rows = [asdict(row) for row in self.rows]  # type: ignore[call-overload]
            save_json(self._path, {**self._found(), "settings": self.settings, self._name: rows})
        return row

    def _found(self) -> dict[str, Any]:
        """What the file holds; nothing if it is of other settings."""
        found: dict[str, Any] = load_json(self._path) if self._path is not None and self._path.exists() else {}
        return found if isinstance(found, dict) and found.get("settings") == self.settings else {}

    def has(self, **key: Any) -> bool:
        return any(all(getattr(row, name) == key[name] for name in self._key) for row in self.rows)
