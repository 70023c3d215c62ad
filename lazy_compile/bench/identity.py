"""How surely latents tell their own request from others: what follows from a step of the same one, and what does not.

Requests of one trained model are sampled side by side, with every scheduler of diffusers that steps its output. At each
call the latents are held against the step before of their own request, and against that of every other one, under the
worst assumption: all of them have the same conditions and the same times, so that nothing but the latents tells.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazy_compile.bench.rows import RowFile
from lazy_compile.bench.tasks.registry import SUBJECTS
from lazy_compile.errors import import_optional
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.fingerprint import LATENTS, samples_of
from lazy_compile.runtime.latent_fit import unexplained_share
from lazy_compile.runtime.matching import Content, fit_of
from lazy_compile.runtime.positions import (
    REACH,
    Position,
    Returned,
    Trajectory,
    next_position,
    turns_back,
)

STEPS = (4, 10, 40)
MANY = 1000, ("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler")
"""The largest number of steps, and the schedulers that it is measured with."""

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class IdentityRow:
    """One scheduler at one number of steps.

    Attributes:
        calls: that continue another, of all requests.
        continued: the share of them that are proven to follow from the step before of their request.
        exact: the share that follows but for rounding.
        farthest: the share of latents that is left unexplained by their own step before, at most.
        impostors: comparisons with a step of another request.
        mistaken: how many of these would pass as the step before, if the true one were not known.
        confused: how many explain the latents better than the true one does, among those that would pass.
        nearest: what another request left unexplained, at least.
    """

    model: str
    scheduler: str
    steps: int
    calls: int
    continued: float
    exact: float
    farthest: float
    impostors: int
    mistaken: int
    confused: int
    nearest: float


def run(
    output: str | Path | None = None,
    *,
    steps: Sequence[int] = STEPS,
    schedulers: Sequence[str] | None = None,
    requests: int = 4,
    on_progress: OnProgress = no_progress,
) -> list[IdentityRow]:
    """Measure every scheduler at each number of steps; writes ``identity.json`` and ``.md`` into ``output``.

    Args:
        output: a folder; rows that are there already are not measured again.
        steps: numbers of steps.
        schedulers: of diffusers, by name; None takes all that can be made without arguments, and some at 1,000 steps.
        requests: sampled side by side.
    """
    named = schedulers or scheduler_names()
    jobs = [(name, count) for name in named for count in steps]
    if schedulers is None:
        jobs += [(name, MANY[0]) for name in MANY[1]]
    path = None if output is None else Path(output) / "identity.json"
    rows = RowFile(path, IdentityRow, ("scheduler", "steps"), {"requests": requests})
    models = {name: _model(name, requests) for name in ("digits", "scenes")}
    for position, (name, count) in enumerate(jobs):
        kind = "scenes" if name.startswith(("FlowMatch", "LTX")) else "digits"
        rows.get(partial(_measured, kind, *models[kind], name, count), scheduler=name, steps=count)
        on_progress("sampling", position + 1, len(jobs), f"{name}, {count} steps")
    if output is not None:
        (Path(output) / "identity.md").write_text(page(rows.rows), encoding="utf-8")
    return rows.rows


def scheduler_names() -> list[str]:
    """Schedulers of the installed diffusers that can be made without arguments and step on any latents."""
    diffusers = import_optional("diffusers", "demo")
    return [name for name in sorted(dir(diffusers)) if name.endswith("Scheduler") and _is_usable(name)]


def _is_usable(name: str) -> bool:
    if name.startswith(("Flax", "Dummy")):
        return False
    try:
        latents = [x for x, _, _ in _sampled(name, 4, torch.randn(1, 3, 8, 8), lambda x, t: 0.1 * x)]
    except Exception:  # it needs arguments, another form of latents, or a package that is not there
        return False
    return bool(torch.isfinite(latents[-1]).all())


def _model(name: str, requests: int) -> tuple[Model, Tensor]:
    """A trained denoiser of so many requests, each with a condition of its own, and their noise."""
    subject = SUBJECTS[name]()
    example: dict[str, Any] = {
        key: value[:requests] if isinstance(value, Tensor) else value for key, value in subject.example.items()
    }
    latents = next(key for key in ("hidden_states", "sample", "x") if key in example)
    noise = torch.randn(example[latents].shape, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, time: Tensor) -> Tensor:
        with torch.inference_mode():
            output: Tensor = subject.model(**{**example, latents: x, "timestep": time.expand(requests)})[0]
        return output[:, : x.shape[1]]

    return model, noise


def _sampled(name: str, steps: int, noise: Tensor, model: Model) -> Iterator[tuple[Tensor, float, Tensor]]:
    """What the model is called with at every call: latents and time; and what it returns."""
    diffusers = import_optional("diffusers", "demo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(steps)
        latents = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(1)
        for time in scheduler.timesteps:
            x = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
            output = model(x, torch.as_tensor(time, dtype=torch.float32))
            yield x, float(time), output
            latents = scheduler.step(output, time, latents, **options)[0]


def _measured(model_name: str, model: Model, noise: Tensor, scheduler: str, steps: int) -> IdentityRow:
    own, others = [], []
    at: list[Position] = []
    shares: dict[int, float] = {}
    accepted, mistaken, confused = 0, 0, 0
    for x, time, output in _sampled(scheduler, steps, noise, model):
        contents = [Content(row, time, {}, None) for row in samples_of(x).numpy()]
        if at:
            for number, content in enumerate(contents):
                rest, fits = _against(content, at[number])
                shares[number] = rest
                own.append(rest)
                accepted += fits
                for position in at[:number] + at[number + 1 :]:
                    other, passes = _against(content, position)
                    others.append(other)
                    mistaken += passes
                    confused += passes and other < rest
        returned = samples_of(output).numpy()
        at = [
            _next(at[number] if at else None, content, returned[number], shares.get(number, 0.0))
            for number, content in enumerate(contents)
        ]
    return IdentityRow(
        model_name, scheduler, steps, len(own), accepted / len(own), float(np.mean(np.array(own) <= 1e-9)), max(own),
        len(others), mistaken, confused, min(others),
    )  # fmt: skip


def _against(content: Content, position: Position) -> tuple[float, bool]:
    """What of a row does not follow from a position, and whether it passes as its next step."""
    assert content.latents is not None
    fit = fit_of(content, position, is_new=False, turns=turns_back(position, content.time))
    return unexplained_share(content.latents, position)[0], fit is not None and not fit.is_doubtful


def _next(before: Position | None, content: Content, returned: Any, unexplained: float) -> Position:
    if before is None:
        position = Position(Trajectory(None, content.time, content.latents), 0, content.time, content.latents)
    else:
        position = next_position(before, content.latents, content.time, unexplained)
        for old in position.ancestors(before.step + 1)[REACH + 1 :]:
            old.latents, old.returned = None, []
    position.returned = [Returned({}, 0, {} if returned is None else {LATENTS: returned})]
    return position


def page(rows: Sequence[IdentityRow]) -> str:
    """The rows as Markdown, those that are least certain first."""
    lines = []
    for row in sorted(rows, key=lambda item: (item.continued, -item.mistaken, item.scheduler, item.steps)):
        lines.append(
            f"| {row.scheduler.removesuffix('Scheduler')} | {row.steps} | {row.calls} | {100 * row.continued:.1f}% | "
            f"{100 * row.exact:.0f}% | {row.farthest:.1e} | {row.impostors} | {row.mistaken} | {row.confused} | "
            f"{row.nearest:.2f} |"
        )
    return "\n".join([_HEAD, *lines]) + "\n"


_HEAD = """\
# Whose latents these are

Written by `lazy-compile bench identity`. Four requests of one trained model are sampled side by side. The latents of
every call are held against the step before of their own request, and against that of each other one.

- *Proven*: the share of calls that are taken as the next step of their request. The others compute.
- *Exact*: the share that follows from the step before but for rounding.
- *Farthest*: what their own step before leaves unexplained at most, as a share of the squares.
- *Mistaken*: steps of another request that would pass, if conditions, times and places in the batch were the same and
  the true step were unknown; *confused*: those of them that explain the latents better than the true one.
- *Nearest*: what a step of another request leaves unexplained at least.

| scheduler | steps | calls | proven | exact | farthest | others | mistaken | confused | nearest |
|---|---|---|---|---|---|---|---|---|---|"""
