"""The training loop of calibration: gates, optimiser, the price of computing, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.calibration.comparison import SHIFTS as SHIFTS
from lazy_compile.calibration.initial_gates import GateStart, branch_cost, gate_start, initial_gates
from lazy_compile.calibration.soft_step import SoftStep
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.planning.budget import Budget
from lazy_compile.policies.gate_table import GateTable
from lazy_compile.policies.learned import split_row
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.processes import Processes
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.sampling import DenseStep, Sampler
from lazy_compile.storage import load_tensors, save_tensors

Objective = Literal["rollout", "paper"]


@dataclass(frozen=True)
class CalibrationConfig:
    """How gates are trained.

    Attributes:
        target_lazy_ratio: share of branch evaluations to reuse; give this or ``target_compute_ratio``.
        target_compute_ratio: MACs to spend over the dense model's, always-on parts included.
        objective: ``"rollout"`` follows the student's own trajectory from noise and needs a sampler; ``"paper"`` takes
            pairs of consecutive steps from data, with the cache of a full pass (LazyDiT, arXiv 2412.12444).
        iterations: optimiser steps; 0 keeps the plan.
        trajectories: of one optimiser step, or pairs for the paper's objective; their gradients are averaged. Several
            processes share them, so that the gates do not depend on how many processes there are.
        learning_rate: of AdamW.
        knots: rows of the gate table, interpolated over the time input between them; None keeps one row per step.
        rho: price of computing in the lazy loss; None starts from that of the plan and follows the target.
        seed: the first noise seed; every trajectory uses the next.
        checkpoint_every: iterations between two checkpoints.
    """

    target_lazy_ratio: float | None = None
    target_compute_ratio: float | None = None
    objective: Objective = "rollout"
    iterations: int = 12
    trajectories: int = 1
    learning_rate: float = 5e-4
    knots: int | None = None
    rho: float | None = None
    seed: int = 0
    checkpoint_every: int = 2

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ConfigError(f"objective is {self.objective!r}; expected 'rollout' or 'paper'")
        if self.iterations < 0 or self.checkpoint_every < 1 or self.trajectories < 1:
            raise ConfigError("iterations must be 0 or more, checkpoint_every and trajectories 1 or more")
        if self.knots is not None and self.knots < 2:
            raise ConfigError(f"knots is {self.knots}; use 2 or more, or None for one row per step")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        return Budget(self.target_lazy_ratio, self.target_compute_ratio)


@dataclass(frozen=True)
class StepPair:
    """Two consecutive denoising steps of real data, for the paper's objective.

    Attributes:
        previous: keyword arguments of the model at the noisier step.
        current: keyword arguments at the next one.
        target: what the model should return there (the noise, say); None distils from the dense model.
    """

    previous: dict[str, Any]
    current: dict[str, Any]
    target: Tensor | None = None


class GateTrainer:
    """The state of one calibration: gates, optimiser, price of computing, and how far it has come.

    The bias stays at the planned margin, and the weights act on features from which their mean over samples is
    subtracted: training moves decisions between samples, and leaves the plan as their average. (Trained freely on
    one-step errors, which do not see that a stale cache grows staler, gates unlearn the plan and end up worse.)
    """

    def __init__(
        self,
        lazy: LazyModule,
        config: CalibrationConfig,
        sample: Sampler,
        *,
        plan: CacheSchedule | None,
        checkpoint: Path | None,
        on_progress: OnProgress,
    ) -> None:
        self.lazy, self.config, self.sample = lazy, config, sample
        self.checkpoint, self.on_progress = checkpoint, on_progress
        self.history: list[dict[str, float]] = []
        self.cost = branch_cost(lazy, config.budget)
        self.iteration = 0
        if lazy.graph.collective_groups:
            raise ConfigError(
                f"{type(lazy.original).__name__} exchanges tensors between processes, and gates are trained where each "
                "holds a whole model; calibrate without parallelism, and load the gates here"
            )
        self.processes = Processes.here()
        if config.trajectories % self.processes.count:
            raise ConfigError(
                f"trajectories is {config.trajectories}, and {self.processes.count} processes share them; "
                "give a multiple of the number of processes"
            )
        saved = self._read_checkpoint()
        self.processes.wait()  # the first one may write it soon
        start = (
            GateStart.of_arrays(_named("start", saved))
            if saved
            else gate_start(lazy, config.budget, sample, plan, config.seed, on_progress)
        )
        self.start = start
        self.initial = initial_gates(lazy, start, config.knots)
        self.sensitivity = dict(zip(start.timesteps.tolist(), start.sensitivity.tolist(), strict=True))
        device = next(lazy.original.parameters()).device
        # Copies: `initial` is what the trained gates are compared with.
        self.weight = self.initial.weight.to(device, copy=True).requires_grad_()
        self.bias = self.initial.bias.to(device, copy=True)
        self.mean_features = self._observe_features() if config.iterations else torch.zeros_like(self.weight)
        self.optimizer = torch.optim.AdamW([self.weight], lr=config.learning_rate, weight_decay=0.0)
        if saved:
            self._restore(saved)
        elif checkpoint:
            self._write_checkpoint()

    @property
    def rho(self) -> float:
        """What computing costs now: the plan's price at first, and more while rollouts reuse too little (dual ascent).

        A pair has no share of its own to reach, so for the paper's objective it stays.
        """
        if self.config.rho is not None or self.config.objective == "paper":
            return self.start.planned.price if self.config.rho is None else self.config.rho
        target, computes = self.config.target_lazy_ratio, self.config.target_compute_ratio
        missing = sum(
            record["compute_ratio"] - computes if computes is not None else (target or 0.0) - record["lazy_ratio"]
            for record in self.history
        )
        return self.start.planned.price * math.exp(ASCENT * missing)

    @property
    def one_decision(self) -> float:
        """What the dearest decision of the plan counts for in a ratio; 0 where gates do not repeat the plan exactly."""
        if self.config.knots is not None:
            return 0.0
        together = np.bincount(self.lazy.graph.leaders(self.lazy.lazy_config.group), weights=self.cost)
        of_all = float(self.cost.sum()) if self.config.target_lazy_ratio is not None else 1.0
        return float(together.max()) / (of_all * len(self.start.timesteps))

    def table(self) -> GateTable:
        """The gates as they stand, with the subtracted mean folded into the bias."""
        table = self._table()
        return replace(table, weight=table.weight.detach().cpu().clone(), bias=table.bias.detach().cpu().clone())

    def _table(self) -> GateTable:
        parts = (self.weight * self.mean_features).split(list(self.initial.features), dim=1)
        bias = self.bias - torch.stack([part.sum(dim=1) for part in parts], dim=1)
        return replace(self.initial, weight=self.weight, bias=bias)

    def _observe_features(self) -> Tensor:
        """``float32[K, sum(features)]``: what each gate reads on average, along the planned trajectory."""
        seen: dict[float, Tensor] = {}

        def drive(call: ModelCall) -> Any:
            step = self._soft_step(
                call, split_row(self.initial.row(call.timestep), self.initial.features, self.bias.device)
            )
            result = call.run(step)
            seen[call.timestep] = torch.cat([step.pooled[index] for index in sorted(step.pooled)])
            return result

        with torch.no_grad(), self.lazy.call_handler(drive):
            self.sample(self.lazy, self.config.seed)
        times = torch.tensor(list(seen))
        return torch.stack([seen[float(times[(times - knot).abs().argmin()])] for knot in self.initial.knots])

    def _soft_step(self, call: ModelCall, gates: Sequence[tuple[Tensor, Tensor]]) -> SoftStep:
        return SoftStep(gates, self.lazy.lazy_config, call.caches, call.step, self.initial.slopes(call.timestep))

    def train(self, pairs: Iterator[StepPair] | None) -> GateTable:
        if pairs is not None:
            pairs = islice(pairs, self.iteration * self.config.trajectories, None)
        while self.iteration < self.config.iterations:
            record = self._rollout() if self.config.objective == "rollout" else self._pairs(pairs)
            self.history.append(record)
            self.iteration += 1
            if self.checkpoint and self.iteration % self.config.checkpoint_every == 0:
                self._write_checkpoint()
            self.on_progress("training gates", self.iteration, self.config.iterations, f"error {record['error']:.2e}")
        return self.table()

    # One iteration ------------------------------------------------------------------------------------------------

    def _rollout(self) -> dict[str, float]:
        """Trajectories of the student: at each step its output is pulled to the dense model's at the same input,
        weighted by what an error at that step does to the final sample."""
        totals: list[tuple[float, ...]] = []

        def drive(call: ModelCall) -> Any:
            with torch.inference_mode(False), torch.enable_grad():
                call = call.for_training()
                with torch.no_grad():
                    dense = call.run_flat(DenseStep())
                step = self._soft_step(call, self._gates(call.timestep))
                result = call.run(step)
                error = _squared_error(_tensors(result), dense)
                self._learn(self.sensitivity.get(call.timestep, 1.0) * error, step)
                totals.append(self._record(error, step))
            return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)

        first = self.config.seed + 1 + self.iteration * self.config.trajectories
        for seed in self.processes.share(range(first, first + self.config.trajectories)):
            with self.lazy.call_handler(drive):
                self.sample(self.lazy, seed)
        return self._update(totals)

    def _pairs(self, pairs: Iterator[StepPair] | None) -> dict[str, float]:
        taken, every = self.iteration * self.config.trajectories, self.config.trajectories
        chosen = list(islice(pairs or (), every))
        if len(chosen) < every:
            raise ConfigError(
                f"the data ended after {taken + len(chosen)} pairs; {self.config.iterations * every} are needed"
            )
        return self._update([self._pair(pair) for pair in self.processes.share(chosen)])

    def _pair(self, pair: StepPair) -> tuple[float, ...]:
        """The paper's step: a full pass at the noisier step fills the caches, the next one is lazy."""
        caches = CacheState()

        def fill(call: ModelCall) -> list[Tensor]:
            with torch.no_grad():
                return call.run_flat(SoftStep(self._gates(call.timestep), self.lazy.lazy_config, caches, 0))

        def learn(call: ModelCall) -> tuple[SoftStep, list[Tensor], list[Tensor]]:
            step = SoftStep(
                self._gates(call.timestep), self.lazy.lazy_config, caches, 1, self.initial.slopes(call.timestep)
            )
            with torch.no_grad():
                dense = call.run_flat(DenseStep())
            return step, call.run_flat(step), dense

        with self.lazy.call_handler(fill):
            self.lazy(**pair.previous)
        with self.lazy.call_handler(learn):
            step, output, dense = self.lazy(**pair.current)
        error = _squared_error(output, dense if pair.target is None else [pair.target])
        self._learn(error, step)
        return self._record(error, step)

    def _record(self, error: Tensor, step: SoftStep) -> tuple[float, ...]:
        saved = sum(share * self.lazy.branches[index].macs for index, share in step.reused.items())
        return float(error.detach()), step.reused_share, 1.0 - saved / self.lazy.graph.total_macs

    def _gates(self, timestep: float) -> list[tuple[Tensor, Tensor]]:
        return split_row(self._table().row(timestep), self.initial.features, self.weight.device)

    def _learn(self, error: Tensor, step: SoftStep) -> None:
        """Add the gradient of error and lazy loss to the gates', and to nobody else's."""
        if not error.isfinite():
            raise ConfigError(
                f"the error of step {step.step} is not finite in iteration {self.iteration}; check the sampler and the "
                "precision of the model, or lower the learning rate"
            )
        if step.logits:
            (gradient,) = torch.autograd.grad(error + self.rho * self._compute_penalty(step), [self.weight])
            self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient

    def _compute_penalty(self, step: SoftStep) -> Tensor:
        """The lazy loss without its price: what is expected to be computed, counted as the target counts it."""
        shares = [torch.sigmoid(logit).mean() * self.cost[index] for index, logit in step.logits.items()]
        return torch.stack(shares).sum()

    def _update(self, totals: Sequence[tuple[float, ...]]) -> dict[str, float]:
        gradient = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        self.weight.grad = self.processes.sum(gradient) / self.config.trajectories
        torch.nn.utils.clip_grad_norm_([self.weight], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = self.processes.sum(torch.tensor(totals, dtype=torch.float64).mean(0)) / self.processes.count
        return dict(zip(HISTORY, mean.tolist(), strict=True))

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, str]:
        options = {key: value for key, value in asdict(self.config).items() if key != "iterations"}
        return {"kind": "lazy_compile calibration", "format": "2", "options": repr(sorted(options.items()))}

    def _write_checkpoint(self) -> None:
        assert self.checkpoint is not None
        if not self.processes.is_first:
            return
        tensors = {
            "weight": self.weight,
            "mean_features": self.mean_features,
            "iteration": torch.tensor(self.iteration),
        }
        for key, value in self.optimizer.state.get(self.weight, {}).items():
            tensors[f"optimizer.{key}"] = torch.as_tensor(value)
        tensors |= {f"start.{name}": torch.from_numpy(value) for name, value in self.start.to_arrays().items()}
        tensors["history"] = torch.tensor([list(record.values()) for record in self.history], dtype=torch.float64)
        save_tensors(self.checkpoint, tensors, self._identity())

    def _read_checkpoint(self) -> dict[str, Tensor]:
        if self.checkpoint is None or not self.checkpoint.exists():
            return {}
        tensors, metadata = load_tensors(self.checkpoint)
        if metadata != self._identity():
            raise ArtifactError(
                f"the checkpoint {self.checkpoint} belongs to another calibration; use the same options, "
                "or another file to start afresh"
            )
        return tensors

    def _restore(self, saved: dict[str, Tensor]) -> None:
        if saved["weight"].shape != self.weight.shape:
            raise ArtifactError(
                f"the checkpoint {self.checkpoint} holds gates of another model; use another file to start afresh"
            )
        with torch.no_grad():
            self.weight.copy_(saved["weight"])
        self.mean_features = saved["mean_features"].to(self.weight.device)
        if state := _named("optimizer", saved):
            self.optimizer.state[self.weight] = state
        self.iteration = int(saved["iteration"])
        self.history = [dict(zip(HISTORY, row, strict=True)) for row in saved["history"].tolist()]


HISTORY = ("error", "lazy_ratio", "compute_ratio")
"""Per iteration: squared error of the model's output, share of branches that would be reused, and MACs over dense."""

ASCENT = 3.0
"""How fast the price of computing follows the share that is missing to the target, by its logarithm."""


def _named(prefix: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition(".")[2]: value for key, value in saved.items() if key.startswith(f"{prefix}.")}


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _squared_error(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    differences = [(a.float() - b.float()).square().flatten() for a, b in zip(outputs, wanted, strict=False)]
    return torch.cat(differences).mean()
