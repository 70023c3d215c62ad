"""Wherever a writer ends, its artefact is the old one or the new one, and the next run leaves nothing else behind."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fuzz.artefacts import WRITERS, Kind, Workshop
from fuzz.crashes import ended_well, in_child, kill_at_random, states
from lazy_compile.errors import ArtifactError

KILLS = 100


class Bench:
    """A writer, the results of the old and of the new artefact, and the folder that each of them leaves."""

    def __init__(self, shop: Workshop, kind: Kind, root: Path) -> None:
        self.shop, self.kind, self.root, self.folder = shop, kind, root, root / "here"
        self.folder.mkdir(parents=True)
        self.results = []
        for seed in (0, 1):
            self.write(seed)
            self.results.append(self.read(self.folder))
        self.count = len(self.files(self.folder))
        self.renew()

    def write(self, seed: int) -> None:
        self.shop.seed = seed
        self.kind.write(self.shop, self.folder)

    def read(self, folder: Path) -> Any:
        return self.kind.use(self.shop, folder)

    def renew(self, state: Path | None = None) -> None:
        """The folder again as the first artefact alone leaves it, or as a killed writer did."""
        shutil.rmtree(self.folder)
        if state is not None:
            shutil.copytree(state, self.folder)
            return
        self.folder.mkdir()
        self.write(0)

    @staticmethod
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def which(self, folder: Path) -> int:
        seen = self.read(folder)
        assert seen in self.results, "a mixture"
        return self.results.index(seen)

    def check_next_run(self) -> None:
        """It goes on, in another process, and whatever was left of the killed one is gone."""
        assert ended_well(in_child(lambda: self.write(1)))
        assert self.which(self.folder) == 1
        left = self.files(self.folder)
        assert len(left) == self.count, f"left behind: {sorted(left)}"


@pytest.fixture(params=WRITERS, ids=lambda kind: kind.name)
def bench(shop: Workshop, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield Bench(shop, request.param, tmp_path)
    shop.seed = 0


def test_the_old_or_the_new_at_every_point(bench: Bench, tmp_path: Path) -> None:
    found = states(lambda: bench.write(1), bench.folder, tmp_path / "states")
    seen = [bench.which(state) for state in found]
    assert seen == sorted(seen), "the old one came back"
    assert seen[0] == 0
    assert bench.which(bench.folder) == 1
    bench.renew(found[len(found) // 2])
    bench.check_next_run()


@pytest.mark.fuzz
def test_the_next_run_after_every_point(bench: Bench, tmp_path: Path) -> None:
    for state in states(lambda: bench.write(1), bench.folder, tmp_path / "states"):
        bench.renew(state)
        bench.check_next_run()


@pytest.mark.fuzz
def test_nothing_or_the_new_where_nothing_was(bench: Bench, tmp_path: Path) -> None:
    shutil.rmtree(bench.folder)
    bench.folder.mkdir()
    for state in states(lambda: bench.write(1), bench.folder, tmp_path / "states"):
        with suppress(ArtifactError, FileNotFoundError):
            assert bench.which(state) == 1
        bench.renew(state)
        bench.check_next_run()


@pytest.mark.fuzz
def test_killed_at_any_time(bench: Bench) -> None:
    start = time.monotonic()
    assert ended_well(in_child(lambda: bench.write(1)))
    longest, rng = time.monotonic() - start, random.Random(bench.kind.name)
    for _ in range(-(-KILLS // len(WRITERS))):
        bench.renew()
        kill_at_random(lambda: bench.write(1), longest, rng)
        bench.which(bench.folder)
        bench.check_next_run()
