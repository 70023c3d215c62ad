"""Training the gates, and nothing but the gates, until a target share of the work is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lazy_compile.calibration.comparison import HeldOutComparison
from lazy_compile.calibration.trainer import CalibrationConfig as CalibrationConfig
from lazy_compile.calibration.trainer import GateTrainer
from lazy_compile.calibration.trainer import StepPair as StepPair
from lazy_compile.errors import ConfigError
from lazy_compile.policies.gate_table import GateTable
from lazy_compile.policies.learned import Learned
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did.

    Attributes:
        table: the gates; the model follows them now.
        trained: the gates after training, whether kept or not.
        lazy_ratio: measured on a trajectory, like ``compute_ratio``.
        planned_error: change of the final samples (root mean square) under the gates as planned, before training.
        trained_error: the same after training; NaN without any.
        kept: ``"trained"`` where that is clearly better, else ``"planned"``.
        history: one record per iteration.
    """

    table: GateTable
    trained: GateTable
    lazy_ratio: float
    compute_ratio: float
    planned_error: float
    trained_error: float
    kept: str
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


def calibrate(
    lazy: LazyModule,
    config: CalibrationConfig,
    *,
    sample: Sampler,
    data: Iterable[StepPair] | None = None,
    plan: CacheSchedule | None = None,
    checkpoint: str | Path | None = None,
    on_progress: OnProgress = no_progress,
) -> CalibrationReport:
    """Plan, train the deviation from the plan, and set the ratio exactly; base weights stay as they are.

    1. The best fixed schedule under the target is searched for, and how much every decision of it matters is measured.
       These margins are the initial biases, and its slopes the slopes of the gates: they start as that schedule.
    2. The weights are trained on the soft mix ``y = c f(Z) + (1 - c) reuse`` with ``c = sigmoid(compute_logit)``; the
       lazy loss ``rho * sum(c)`` pays for computing. They learn how samples deviate from the plan.
    3. All biases are shifted alike until the measured ratio is the target; a plan that meets it but for one decision
       stays as it is. The planned and the trained table are run on noise that neither has seen. The trained one is kept
       if it changes the final samples less, sample by sample and beyond the uncertainty of that; else the plan is.

    Args:
        lazy: a transformed model; its policy is set to the new gates.
        config: target and training options.
        sample: runs a trajectory.
        data: pairs for ``objective="paper"``.
        plan: the schedule to start from, under the target; None searches one, as
            :func:`~lazy_compile.planning.planner.plan` does.
        checkpoint: a file to resume from and to write to. An interrupted run that is started again with it ends at the
            same gates as one that was not interrupted.
        on_progress: see :mod:`lazy_compile.progress`.

    Raises:
        ConfigError: an option is missing, or the target cannot be reached.
        ArtifactError: the checkpoint belongs to another model or other options.
    """
    if config.objective == "paper" and data is None:
        raise ConfigError("objective='paper' needs data: an iterable of StepPair; or use objective='rollout'")
    start = time.monotonic()
    trainer = GateTrainer(
        lazy,
        config,
        sample,
        plan=plan,
        checkpoint=Path(checkpoint) if checkpoint else None,
        on_progress=on_progress,
    )
    trained = trainer.train(iter(data) if data is not None else None)
    comparison = HeldOutComparison(lazy, sample, config.budget, config.seed, on_progress)
    planned = comparison.match_target(trainer.initial, enough=trainer.one_decision)
    matched = comparison.match_target(trained) if config.iterations else planned
    best = matched if matched.clearly_beats(planned) else planned
    lazy.policy = Learned(best.table)
    return CalibrationReport(
        table=best.table,
        trained=matched.table,
        lazy_ratio=best.lazy_ratio,
        compute_ratio=best.compute_ratio,
        planned_error=planned.error,
        trained_error=matched.error if config.iterations else math.nan,
        kept="planned" if best is planned else "trained",
        seconds=time.monotonic() - start,
        history=trainer.history,
    )
