"""Plans within a number of calls: without gradient, in PyTorch and for an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, LazyModule, Scheduled, export_onnx
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ConfigError
from lazy_compile.planning import call_search, planner
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.call_search import CallSearch
from lazy_compile.planning.estimate import estimate_plan
from lazy_compile.planning.journal import Journal
from lazy_compile.planning.planner import plan
from lazy_compile.planning.replay import first_change, replayable, run_trajectory
from lazy_compile.planning.search import final_error
from lazy_compile.planning.step_paths import StepCosts
from lazy_compile.planning.whole_step_starts import every_nth, fitting
from lazy_compile.progress import no_progress
from support.sampling import STEPS, inputs, lazy_tiny_dit, sample, start

BUDGET = Budget(lazy_ratio=0.5)


def guided(denoiser: Callable[..., Tensor], seed: int) -> Tensor:
    """Two calls a step, detached."""
    x = start(seed)
    for step in range(STEPS):
        given = inputs(x, 1000.0 - 160.0 * step)
        towards, plain = denoiser(**given), denoiser(**{**given, "y": torch.full_like(given["y"], 9)})
        x = (x - 0.1 * (plain + 1.5 * (towards - plain))).detach()
    return x


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_tiny_dit()


@pytest.fixture(scope="module")
def engine(lazy: LazyModule, tmp_path_factory: pytest.TempPathFactory) -> EngineDenoiser:
    path = tmp_path_factory.mktemp("engine") / "dit.onnx"
    export_onnx(lazy, path, gating="input", dynamic=False)
    return EngineDenoiser(OnnxRunner(path, threads=1), lazy.policy)


class Counted:
    """The calls of a model, in PyTorch or an engine, that were really run."""

    def __init__(self, denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        kind, name = (type(denoiser.graph), "run") if isinstance(denoiser, LazyModule) else (OnnxRunner, "run")
        run = getattr(kind, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return run(*args, **options)

        monkeypatch.setattr(kind, name, counted)


@pytest.fixture(params=["lazy", "engine"])
def denoiser(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("keep_every", [1, 3])
@pytest.mark.parametrize("sampler", [sample, guided])
def test_a_trajectory_that_is_continued_ends_where_it_does_from_the_start(
    denoiser: Any, sampler: Callable[..., Tensor], keep_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replayable(denoiser)
    draw = np.random.default_rng(0)
    base = run_trajectory(target, sampler, 0, CacheSchedule.every(2, STEPS, 4), keep_every=keep_every)
    assert all((step % keep_every == 0) or state is None for step, state in zip(base.steps, base.states, strict=True))
    for step in range(1, STEPS):
        table = base.schedule.should_compute.copy()
        table[step:] = draw.integers(0, 2, table[step:].shape)
        schedule = CacheSchedule(table, draw.uniform(0, 1, table.shape))
        begin = first_change(base.schedule, schedule) // keep_every * keep_every
        counted = Counted(denoiser, monkeypatch)
        continued = run_trajectory(target, sampler, 0, schedule, base)
        assert counted.calls == continued.calls == (STEPS - begin) * len(base.steps) // STEPS
        monkeypatch.undo()
        whole = run_trajectory(target, sampler, 0, schedule)
        assert torch.equal(continued.samples, whole.samples)
        denoiser.policy = Scheduled(schedule)
        with torch.no_grad():
            assert torch.equal(sampler(denoiser, 0), whole.samples)


def test_what_reuses_nothing_is_continued_by_what_does(denoiser: Any) -> None:
    target, dense = replayable(denoiser), CacheSchedule.always_compute(STEPS, 4)
    table = dense.should_compute.copy()
    table[STEPS - 2 :] = False
    continued = run_trajectory(target, sample, 0, CacheSchedule(table), run_trajectory(target, sample, 0, dense))
    assert continued.calls == 2
    assert torch.equal(continued.samples, run_trajectory(target, sample, 0, CacheSchedule(table)).samples)


def test_a_limit_of_memory_keeps_fewer_caches(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    free = estimate_plan(lazy, sample, calls=150)
    cap = int(0.6 * free.device_bytes)
    less = estimate_plan(lazy, sample, calls=150, max_memory=cap)
    assert free.keep_every == 1 < less.keep_every
    assert less.device_bytes <= cap
    seen: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[5] if len(args) > 5 else kwargs.get("keep_every", 1))
        return run_trajectory(*args, **kwargs)

    monkeypatch.setattr(call_search, "run_trajectory", noted)
    counted = Counted(lazy, monkeypatch)
    found = plan(lazy, sample, BUDGET, calls=150, max_memory=cap, on_progress=no_progress)
    assert set(seen) == {less.keep_every}
    assert counted.calls <= 150 + 3  # one counts the steps, two are measured
    assert found.lazy_ratio >= 0.5
    with pytest.raises(ConfigError, match=r"a plan takes at least .* GB of memory beside the model"):
        plan(lazy, sample, BUDGET, calls=150, max_memory=1000, on_progress=no_progress)


@pytest.mark.parametrize("calls", [60, 150])
def test_a_plan_keeps_to_its_calls_and_its_budget(denoiser: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, counted = denoiser.policy, Counted(denoiser, monkeypatch)
    schedule = plan(denoiser, sample, BUDGET, calls=calls, on_progress=no_progress)
    assert counted.calls <= calls + 1  # one counts the steps
    assert schedule.lazy_ratio >= 0.5
    assert denoiser.policy is policy


def test_every_nth_step_after_a_warm_up_is_always_tried(lazy: LazyModule) -> None:
    target, cost = replayable(lazy), np.ones(4)
    search = CallSearch(target, (sample,), cost, BUDGET, calls=80)
    found = search.run(0, no_progress)
    tables = [fitting(rule, search._affordable(), 1) for rule in every_nth(STEPS)]
    simple = {np.repeat(steps[:, None], 4, axis=1).tobytes() for steps in tables if steps is not None}
    assert len(simple) > 2
    assert simple < {judged.schedule.should_compute.tobytes() for judged in search._judged.values()}
    assert found.lazy_ratio >= 0.5


def test_it_is_better_than_every_second_step_on_other_noise(lazy: LazyModule) -> None:
    found = plan(lazy, sample, BUDGET, calls=150, on_progress=no_progress)
    errors = [
        np.mean([final_error(lazy, sample, schedule, seed) for seed in (501, 502)])
        for schedule in (found, CacheSchedule.every(2, STEPS, 4))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_sampler_that_detaches_is_planned_without_gradient(
    lazy: LazyModule, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "CALLS", 80)
    schedule = plan(lazy, guided, BUDGET, on_progress=no_progress)
    assert schedule.lazy_ratio >= 0.5
    assert "searching within 80 calls of the model, without gradient" in caplog.text


def test_what_is_interrupted_ends_at_the_same_plan(
    lazy: LazyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def planned(folder: Path | None) -> CacheSchedule:
        return plan(lazy, sample, BUDGET, calls=60, checkpoint=folder, on_progress=no_progress)

    whole, write, runs = planned(None), Journal.write, 0

    def write_and_die(journal: Journal, name: str, arrays: Any) -> None:
        write(journal, name, arrays)
        raise Killed

    monkeypatch.setattr(Journal, "write", write_and_die)
    while True:
        try:
            resumed = planned(tmp_path)
            break
        except Killed:
            runs += 1
    assert resumed == whole
    assert runs == len(list(tmp_path.glob("*.safetensors"))) > 5


def test_few_calls_are_refused(lazy: LazyModule) -> None:
    with pytest.raises(ConfigError, match=r"20 calls are too few to compare two schedules of 6 steps; give 36"):
        plan(lazy, sample, BUDGET, calls=20, on_progress=no_progress)


def test_the_shortest_path_misses_least_of_all_choices(lazy: LazyModule) -> None:
    dense = run_trajectory(replayable(lazy), sample, 0, CacheSchedule.always_compute(STEPS, 4))
    costs = StepCosts.of([dense], linear=True, fitted=True)
    for power in (0.0, 2.0):
        path = costs.path(3, 1, power)
        assert path.sum() == 3
        choices = [
            np.isin(np.arange(STEPS), (0, *pair)) for pair in ((a, b) for a in range(1, 6) for b in range(a + 1, 6))
        ]
        assert costs.cost(path, power) == pytest.approx(min(costs.cost(each, power) for each in choices))
