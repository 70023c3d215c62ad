"""No damaged file leads to a traceback from below or to a wait; where there is a digest, to no other result."""

from __future__ import annotations

import os
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx_ir
import pytest

from fuzz.artefacts import KINDS, Kind, make_lazy
from fuzz.mutators import mutate
from lazy_compile import LazyModule, Learned
from lazy_compile.backends.onnx.save import save_pair
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
            if seed == 0 or kind.files > 1:
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


@pytest.mark.parametrize("kind", ["gates", "prologue"])
def test_a_writer_that_ends_at_any_replacement_leaves_the_old_or_the_new(
    made: tuple[LazyModule, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lazy, good, other = made
    (chosen,) = [item for item in KINDS if item.name == kind]
    expected = [chosen.use(lazy, root / kind) for root in (good, other)]
    replace, left = os.replace, -1

    def ends(*paths: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(*paths)

    def write(folder: Path) -> None:
        if kind == "gates":
            lazy.policy = Learned(lazy.policy.table.shifted(1.0))  # type: ignore[attr-defined]
            lazy.save(folder)
            return
        models = [onnx_ir.load(other / kind / name) for name in ("m.onnx", "m.prologue.onnx")]
        save_pair(*models, folder / "m.onnx", "predicate")

    policy = lazy.policy
    seen = []
    for point in range(4):
        folder = tmp_path / str(point)
        shutil.copytree(good / kind, folder)
        left = point
        monkeypatch.setattr(os, "replace", ends)
        with suppress(KeyboardInterrupt):
            write(folder)
        monkeypatch.setattr(os, "replace", replace)
        lazy.policy = policy
        seen.append(expected.index(chosen.use(lazy, folder)))
    assert seen == sorted(seen)
    assert {seen[0], seen[-1]} == {0, 1}


@pytest.mark.fuzz
def test_two_thousand_damaged_artefacts(made: tuple[LazyModule, Path, Path], tmp_path: Path) -> None:
    counts = run(made, 2000, tmp_path)
    assert set(counts) <= {"same", "refused"}, "\n".join(counts)
