"""No damaged file leads to a traceback from below or to a wait; where there is a digest, to no other result."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fuzz.artefacts import KINDS, Kind, Workshop
from fuzz.mutators import mutate
from lazy_compile.errors import LazyCompileError

LONGEST = 300
"""Characters of a message, the folder of the file apart."""

MEMORY = 2**30
"""Bytes that reading a damaged file may add to the most that was ever used."""

Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    roots = []
    for shop.seed in (0, 1):
        roots.append(tmp_path_factory.mktemp(f"seed{shop.seed}"))
        for kind in KINDS:
            (roots[-1] / kind.name).mkdir()
            if shop.seed == 0 or kind.files > 1:
                kind.write(shop, roots[-1] / kind.name)
    shop.seed = 0
    return roots[0], roots[1]


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


def outcome(kind: Kind, shop: Workshop, folder: Path, expected: object, *, may_differ: bool) -> str:
    try:
        with time_limit(20), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = kind.use(shop, folder)
    except LazyCompileError as error:
        message = str(error).replace(str(folder), "")
        return "refused" if len(message) <= LONGEST and "\n" not in message else f"long message: {message[:400]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "same" if may_differ or not kind.sealed or seen == expected else "another result"


def run(shop: Workshop, made: Folders, count: int, tmp_path: Path, first: int = 0) -> Counter[str]:
    good, other = made
    expected = {kind.name: kind.use(shop, good / kind.name) for kind in KINDS}
    counts: Counter[str] = Counter()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + count):
        kind, rng, folder = KINDS[seed % len(KINDS)], random.Random(seed), tmp_path / "damaged"
        shutil.copytree(good / kind.name, folder)
        done, sealed_again = mutate(folder, other / kind.name, rng)
        may_differ = sealed_again or (not kind.complete and done.startswith("delete"))
        result = outcome(kind, shop, folder, expected[kind.name], may_differ=may_differ)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (used - most) * 1024 > MEMORY:
            result = f"it took {(used - most) / 2**20:.1f} GiB"
        most = max(most, used)
        counts[result if result in ("same", "refused") else f"{kind.name}, {done} (seed {seed}): {result}"] += 1
        shutil.rmtree(folder)
    return counts


def test_a_hundred_damaged_artefacts(shop: Workshop, made: Folders, tmp_path: Path) -> None:
    counts = run(shop, made, 100, tmp_path)
    assert set(counts) <= {"same", "refused"}, "\n".join(counts)
    assert counts["refused"] > 50


@pytest.mark.fuzz
def test_two_thousand_damaged_artefacts(shop: Workshop, made: Folders, tmp_path: Path) -> None:
    counts = run(shop, made, 2000, tmp_path, first=100)
    print(counts)
    assert set(counts) <= {"same", "refused"}, "\n".join(counts)
