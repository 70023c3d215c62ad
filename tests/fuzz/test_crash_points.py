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

FOREIGN = {
    "mask-mine.onnx", "gates.0123456789abcdef.safetensors", "m.01234567.data", "weights.mine.data",
    "prologue.mine.onnx", ".m.onnx.mine.partial",
}  # fmt: skip
"""Files of other people, some of them named as ours could be."""


class Bench:
    """A writer, the results of the old and of the new artefact, and the folder that each of them leaves."""

    def __init__(self, shop: Workshop, kind: Kind, root: Path) -> None:
        self.shop, self.kind, self.root, self.folder = shop, kind, root, root / "here"
        self.folder.mkdir(parents=True)
        self.results = []
        for seed in (0, 1):
            self.write(seed)
            self.results.append(self.read(self.folder))
            self.invite()
        assert self.visitors(self.folder) == self.invited
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
        self.invite()

    def invite(self) -> None:
        """Files of other people in every folder that ours lie in."""
        for place in {path.parent for path in self.folder.rglob("*") if path.is_file()}:
            for name in FOREIGN:
                (place / name).write_text("not yours")
        self.invited = self.visitors(self.folder)

    @staticmethod
    def visitors(folder: Path) -> dict[str, str]:
        return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.name in FOREIGN}

    @staticmethod
    def files(folder: Path) -> set[str]:
        return {
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in FOREIGN
        }

    def which(self, folder: Path) -> int:
        seen = self.read(folder)
        assert seen in self.results, "a mixture"
        return self.results.index(seen)

    def check_next_run(self) -> None:
        """It goes on, in another process, and whatever was left of the killed one is gone."""
        before = self.visitors(self.folder)
        assert ended_well(in_child(lambda: self.write(1)))
        assert self.which(self.folder) == 1
        assert self.visitors(self.folder) == before
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
    for state in (found[len(found) // 2], found[-1]):
        bench.renew(state)
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
    parts = [] if bench.kind.complete else [{}, bench.results[0]]  # a search has measured nothing, then something
    for state in states(lambda: bench.write(1), bench.folder, tmp_path / "states"):
        with suppress(ArtifactError, FileNotFoundError):
            assert bench.read(state) in [bench.results[1], *parts], "a mixture"
        bench.renew(state)
        bench.check_next_run()


@pytest.mark.fuzz
def test_of_two_writers_one_wins_whole(bench: Bench) -> None:
    for _ in range(3):
        children = [in_child(lambda seed=seed: bench.write(seed)) for seed in (0, 1, 0, 1)]  # type: ignore[misc]
        ended = [ended_well(child) for child in children]
        assert all(ended)
        bench.which(bench.folder)
        assert len(bench.files(bench.folder)) == bench.count


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
