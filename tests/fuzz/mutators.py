"""Seeded damage to the files of a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VALUES: list[Any] = [None, True, -1, 10**30, 0.5, -3.0, 1e308, "", "x" * 5000, "<b>$", [], {}, [[]], "../x"]
TEXTS = ["NaN", "Infinity", "1e999", "9" * 5000, "[" * 100_000, '"\ud83d"']


def mutate(folder: Path, other: Path, rng: random.Random) -> str:
    """Damage one file of ``folder``; ``other`` holds one of the same kind. Says what was done."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kinds = [flip_bits, truncate, extend, delete]
    if len(list(other.rglob("*"))) > 1:  # a lone file of another model is a good artefact
        kinds.append(swap)
    if file.suffix == ".json":
        kinds += [edit_json, edit_json, odd_json]
    kind = rng.choice(kinds)
    kind(file, other / file.relative_to(folder), rng)
    return f"{kind.__name__} {file.name}"


def flip_bits(file: Path, _: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, _: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(max(len(content), 1))])


def extend(file: Path, _: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def swap(file: Path, other: Path, rng: random.Random) -> None:
    candidates = [other] if other.is_file() else sorted(other.parent.glob(f"*{file.suffix}"))
    if candidates:
        file.write_bytes(rng.choice(candidates).read_bytes())


def delete(file: Path, _: Path, rng: random.Random) -> None:
    file.unlink()


def edit_json(file: Path, _: Path, rng: random.Random) -> None:
    values = json.loads(file.read_text())
    place, key = rng.choice(list(_places(values)))
    action = rng.choice(("set", "set", "drop", "nudge"))
    if action == "drop":
        del place[key]
    elif action == "nudge" and isinstance(place[key], int | float):
        place[key] = 1 - place[key]
    else:
        place[key] = rng.choice(VALUES)
    file.write_text(json.dumps(values))


def odd_json(file: Path, _: Path, rng: random.Random) -> None:
    values = json.loads(file.read_text())
    place, key = rng.choice(list(_places(values)))
    place[key] = "@@"
    file.write_text(json.dumps(values).replace('"@@"', rng.choice(TEXTS)), errors="surrogatepass")


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _places(value)
