"""``polygraphy run`` with lazy models: found by its entry point, caches handed from iteration to iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from polygraphy.comparator import RunResults
from polygraphy.tools import main

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.polygraphy import LazyRunner
from support.toy_models import TOYS, trajectory

# Polygraphy reads entry points as Python 3.9 had them.
pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups dict interface:DeprecationWarning")

STEPS = 6
Array = np.ndarray[Any, Any]
Exported = Callable[[str, str], tuple[LazyModule, Path, Any]]

DATA = """
import sys
sys.path.insert(0, {tests!r})
from support.toy_models import TOYS, trajectory

def load_data():
    for call in trajectory(TOYS["dit"], steps={steps}):
        yield {{name: value.numpy() for name, value in call.items()}}
"""


def run(folder: Path, *arguments: object) -> list[Array]:
    """The first output at every iteration."""
    script, results = folder / "data.py", folder / "results.json"
    script.write_text(DATA.format(tests=str(Path(__file__).resolve().parents[1]), steps=STEPS))
    words = ["run", *arguments, "--data-loader-script", script, "--save-outputs", results, "--silent"]
    assert not main(list(map(str, words)))
    ((_, iterations),) = RunResults.load(str(results))
    return [np.asarray(iteration["output_0"]) for iteration in iterations]


def in_pytorch(lazy: LazyModule, should_compute: Array) -> list[Array]:
    lazy.policy = Scheduled(CacheSchedule(should_compute))
    with torch.no_grad():
        return [lazy(**call).numpy() for call in trajectory(TOYS["dit"], steps=STEPS)]


def assert_alike(seen: list[Array], expected: list[Array]) -> None:
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_iterations_are_the_steps_of_a_trajectory(exported: Exported, tmp_path: Path, every: int) -> None:
    lazy, path, _ = exported("dit", "linear")
    steps = CacheSchedule.every(every, STEPS, len(lazy.branches)).should_compute
    assert_alike(run(tmp_path, path, "--lazy", "--lazy-every", every), in_pytorch(lazy, steps))


def test_gates_decide(exported: Exported, tmp_path: Path) -> None:
    lazy, path, _ = exported("dit", "linear")
    steps = CacheSchedule.random(0.5, STEPS, len(lazy.branches), seed=0).should_compute
    expected = in_pytorch(lazy, steps)
    lazy.save(tmp_path / "gates")
    assert_alike(run(tmp_path, path, "--lazy", "--lazy-gates", tmp_path / "gates"), expected)


def test_what_was_reused_is_counted(exported: Exported) -> None:
    _, path, _ = exported("dit", "linear")
    with LazyRunner(str(path), every=3) as runner:
        for call in trajectory(TOYS["dit"], steps=STEPS):
            runner.infer({name: value.numpy() for name, value in call.items()})
        assert runner.reused == 4 * len(runner.runner.branches)


def test_two_rules_exclude_each_other() -> None:
    for options in ({"every": 2, "gates": "gates"}, {"every": 0}):
        with pytest.raises(ConfigError, match="or --lazy-gates decides; give one of them"):
            LazyRunner("model.onnx", **options)
