"""No damaged file leads to a traceback from below or a wait without end; where there is a digest, to no other result."""

from __future__ import annotations

import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fuzz.artefacts import KINDS, Kind, make_lazy
from fuzz.mutators import mutate
from lazy_compile import LazyModule
from lazy_compile.errors import LazyCompileError

LONGEST = 300
"""Characters of a message, the folder of the file apart."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LazyModule, Path, Path]:
    pairs = []
    for seed in (0, 1):
        lazy, root = make_lazy(seed), tmp_path_factory.mktemp(f"seed{seed}")
        for kind in KINDS:
            (root / kind.name).mkdir()
            kind.write(lazy, root / kind.name)
        pairs.append((lazy, root))
    return pairs[0][0], pairs[0][1], pairs[1][1]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def expired(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, lazy: LazyModule, folder: Path, expected: object) -> str:
    try:
        with time_limit(20), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = kind.use(lazy, folder)
    except LazyCompileError as error:
        message = str(error).replace(str(folder), "")
        return "refused" if len(message) <= LONGEST and "\n" not in message else f"long message: {message[:400]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "same" if not kind.sealed or seen == expected else "another result"


def run(made: tuple[LazyModule, Path, Path], count: int, tmp_path: Path) -> Counter[str]:
    lazy, good, other = made
    expected = {kind.name: kind.use(lazy, good / kind.name) for kind in KINDS}
    counts: Counter[str] = Counter()
    for seed in range(count):
        kind, rng, folder = KINDS[seed % len(KINDS)], random.Random(seed), tmp_path / "damaged"
        shutil.copytree(good / kind.name, folder)
        done = mutate(folder, other / kind.name, rng)
        result = outcome(kind, lazy, folder, expected[kind.name])
        counts[result if result in ("same", "refused") else f"{kind.name}, {done} (seed {seed}): {result}"] += 1
        shutil.rmtree(folder)
    return counts


def test_sixty_damaged_artefacts(made: tuple[LazyModule, Path, Path], tmp_path: Path) -> None:
    counts = run(made, 60, tmp_path)
    assert set(counts) <= {"same", "refused"}, "\n".join(counts)
    assert counts["refused"] > 30


@pytest.mark.fuzz
def test_two_thousand_damaged_artefacts(made: tuple[LazyModule, Path, Path], tmp_path: Path) -> None:
    counts = run(made, 2000, tmp_path)
    assert set(counts) <= {"same", "refused"}, "\n".join(counts)
