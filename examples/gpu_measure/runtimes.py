"""What is measured: each way to run a model, dense and gated, as functions without arguments."""

from __future__ import annotations

import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lean_steps import LeanSteps, captured

from lazy_compile import CacheSchedule, LazyConfig, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.runner import Runner
from lazy_compile.backends.tensorrt.build import build_engine, build_engines
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.runner import TensorRTRunner
from lazy_compile.errors import LazyCompileError

Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One model, and where its files go."""

    model: torch.nn.Module
    lazy: LazyModule
    inputs: dict[str, Any]
    folder: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Arm:
    """One way to run a model.

    Attributes:
        runtime: ``"eager"``, ``"tensorrt"`` and so on.
        gating: who decides.
        group: branches under one gate.
        dense: the model without gates in the same runtime.
        gated: from a schedule, whose first row computes everything and whose others are alike, to its steps.
    """

    runtime: str
    gating: str
    group: int | str
    dense: Step
    gated: Callable[[CacheSchedule], Iterator[Any]]


# PyTorch --------------------------------------------------------------------------------------------------------------


def eager(case: Case, group: int | str) -> Arm:
    case.lazy.lazy_config = replace(case.lazy.lazy_config, group=group)

    def dense() -> Any:
        with torch.inference_mode():
            return case.model(**case.inputs)

    def gated(schedule: CacheSchedule) -> Iterator[Any]:
        case.lazy.policy = Scheduled(schedule)
        return _steps(case.lazy, case.inputs, schedule)

    return Arm("PyTorch eager", "PyTorch", group, dense, gated)


def compiled(case: Case, group: int | str) -> Arm:
    """``torch.compile`` of the dense model, and of one lean program for each set of decisions."""
    return _lean(case, group, "torch.compile", lambda module: torch.compile(module, dynamic=False), lambda step: step)


def cuda_graphs(case: Case, group: int | str) -> Arm:
    return _lean(case, group, "CUDA graph per mask", lambda module: module, captured)


def conditional_nodes(case: Case, group: int | str) -> Arm:
    """One CUDA graph for all masks: a conditional node for each gate, decisions in GPU memory."""
    steps = LeanSteps(case.lazy, case.inputs, case.lazy.graph.leaders(group))
    dense = captured(_no_grad(lambda: case.model(**case.inputs)))
    leaders = sorted(set(case.lazy.graph.leaders(group)))
    decisions = {f"should_compute_{leader}": torch.ones((), dtype=torch.bool, device="cuda") for leader in leaders}
    replay = captured(_no_grad(steps.conditional(decisions)))

    def gated(schedule: CacheSchedule) -> Iterator[Any]:
        for row in schedule.should_compute:
            for leader in leaders:
                decisions[f"should_compute_{leader}"].fill_(bool(row[leader]))
            yield replay()

    return Arm("CUDA graph with conditional nodes", "input", group, dense, gated)


def _lean(case: Case, group: int | str, name: str, wrap: Callable[[Any], Any], finish: Callable[[Step], Step]) -> Arm:
    steps = LeanSteps(case.lazy, case.inputs, case.lazy.graph.leaders(group))
    model = wrap(case.model)
    dense = finish(_no_grad(lambda: model(**case.inputs)))

    def gated(schedule: CacheSchedule) -> Iterator[Any]:
        made: dict[tuple[bool, ...], Step] = {}
        for row in map(tuple, schedule.should_compute.tolist()):
            if row not in made:
                made[row] = finish(_no_grad(steps.step(row, wrap)))
            yield made[row]()

    return Arm(name, "schedule", group, dense, gated)


def _no_grad(step: Step) -> Step:
    def run() -> Any:
        with torch.no_grad():
            return step()

    return run


# Exported models ------------------------------------------------------------------------------------------------------


class Exported:
    """One runtime of exported models. Files of a gating are removed when its arm is done: they are large."""

    def __init__(self, case: Case, name: str, load: Callable[[Path], Runner]) -> None:
        self.case, self.name, self._load = case, name, load
        self._lean = self._make("schedule", 1)

    def arm(self, gating: str, group: int | str) -> Arm:
        """Dense is the lean model that computes everything: no gate is in it."""
        lean = gating == "schedule" and group == 1
        runner = self._lean if lean else self._make(gating, group)

        def gated(schedule: CacheSchedule) -> Iterator[Any]:
            denoiser = EngineDenoiser(runner, Scheduled(schedule), LazyConfig(group=group))  # type: ignore[arg-type]
            return _steps(denoiser, self.case.inputs, schedule)

        return Arm(self.name, gating, group, lambda: self._lean.run(self.case.tensors, force="compute"), gated)

    def _make(self, gating: str, group: int | str) -> Runner:
        case = self.case
        with tempfile.TemporaryDirectory(dir=case.folder) as folder:
            path = Path(folder) / ("set" if gating == "schedule" else "m.onnx")
            if gating == "schedule":
                leaders = case.lazy.graph.leaders(group)  # type: ignore[arg-type]
                case.lazy.policy = Scheduled(CacheSchedule(np.stack([mask_of(reuse, leaders) for reuse in REUSE])))
            options: dict[str, Any] = {"predictors": False} if gating == "input" else {}
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                export_onnx(case.lazy, path, case.inputs, gating=gating, group=group, **options)  # type: ignore[arg-type]
            return self._load(path)


def onnxruntime(path: Path) -> Runner:
    cuda = torch.cuda.is_available()
    return OnnxRunner(path, providers=["CUDAExecutionProvider"] if cuda else ["CPUExecutionProvider"])


def tensorrt(path: Path, flavor: str) -> Runner:
    config, engine = BuildConfig(flavor=flavor), path.with_name("engine")  # type: ignore[arg-type]
    (build_engines if path.is_dir() else build_engine)(path, engine, config)
    return TensorRTRunner(engine)


def mask_of(reuse: float, leaders: Sequence[int]) -> Any:
    """``bool[branches]``: an even share of the gates reuses, and the branches that each of them leads."""
    gates = sorted(set(leaders))
    count = round(reuse * len(gates))
    reusing = {gates[index * len(gates) // max(count, 1)] for index in range(count)}
    return np.array([leader not in reusing for leader in leaders])


def _steps(denoiser: Any, inputs: dict[str, Any], schedule: CacheSchedule) -> Iterator[Any]:
    """A trajectory whose time falls at each step."""
    time = inputs["timestep"]
    for step in range(schedule.steps):
        with torch.inference_mode():
            result = denoiser(**{**inputs, "timestep": time - (step / 128 if time.is_floating_point() else step)})
        yield result


# What there is --------------------------------------------------------------------------------------------------------

REUSE = (0.0, 0.25, 0.5, 0.75, 1.0)
PYTORCH: Sequence[Callable[[Case, int | str], Arm]] = (eager, compiled, cuda_graphs, conditional_nodes)
TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}


def arms(case: Case, flavors: Sequence[str], groups: Sequence[int | str], small: bool) -> Iterator[Arm | str]:
    """Every way that this machine has; a line with the reason in the place of one that it has not."""
    makers = PYTORCH if torch.cuda.is_available() else PYTORCH[: 1 if small else 2]
    for maker, group in itertools.product(makers, groups):
        yield from _try(f"{maker.__name__}, group {group}", partial(maker, case, group))
    for flavor in flavors:
        load = onnxruntime if flavor == "onnxruntime" else partial(tensorrt, flavor=flavor)
        for runtime in _try(flavor, partial(Exported, case, TITLES[flavor], load)):
            if isinstance(runtime, str):
                yield runtime
                continue
            for gating, group in itertools.product(("predicate", "input", "schedule"), groups):
                yield from _try(f"{flavor}, {gating}, group {group}", partial(runtime.arm, gating, group))


def _try(name: str, make: Callable[[], Any]) -> Iterator[Any]:
    try:
        yield make()
    except (LazyCompileError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        yield f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
