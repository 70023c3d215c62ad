"""Requests that sample one denoiser with a scheduler of diffusers, call by call, so that a test can interleave them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from lazy_compile.integrations.followed_scheduler import follow
from lazy_compile.runtime.trajectory import Trajectories
from support.layers import TOKENS, WIDTH, WORDS

STEPS = 8
SCALE = 2.0

Guidance = str
GUIDANCES: tuple[Guidance, ...] = ("none", "batched", "conditional first", "unconditional first", "interval", "toggled")


def scheduler_names() -> list[str]:
    """Schedulers that can be made without arguments and step on any latents."""
    return [name for name in sorted(dir(diffusers)) if name.endswith("Scheduler") and _is_usable(name)]


def _is_usable(name: str) -> bool:
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or name.startswith(("Flax", "Dummy")):
        return False
    try:
        request = Request(name, seed=0)
        for _ in request.calls(lambda x, t, text: 0.1 * x):
            pass
    except Exception:  # it needs arguments, or another form of latents
        return False
    return bool(torch.isfinite(request.latents).all())


@dataclass
class Request:
    """One trajectory, from its own noise and text.

    Attributes:
        scheduler: a class of diffusers, by name.
        seed: of its noise and text.
        guidance: how often the model is called in a step.
    """

    scheduler: str
    seed: int
    guidance: Guidance = "none"

    follower: ClassVar[Trajectories | None] = None
    """Those of the model, where they are to see what each step makes of the latents, as in a pipeline."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.latents = torch.randn(1, TOKENS, 8, generator=generator)
        self.text, self.empty = (torch.randn(1, WORDS, WIDTH, generator=generator) for _ in range(2))
        self.noise = generator

    def calls(self, model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[int]:
        """Sample; yields after each step, so that others may go on."""
        scheduler = getattr(diffusers, self.scheduler)()
        if self.follower is not None:
            follow(scheduler, self.follower)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(STEPS)
            if "sigma" in scheduler.__dict__ or hasattr(scheduler, "init_noise_sigma"):
                self.latents = self.latents * float(scheduler.init_noise_sigma)
            options: dict[str, Any] = {}
            if "generator" in inspect.signature(scheduler.step).parameters:
                options["generator"] = self.noise
            for index, time in enumerate(scheduler.timesteps):
                x = self.latents
                if hasattr(scheduler, "scale_model_input"):
                    x = scheduler.scale_model_input(x, time)
                output = self._guided(model, x, torch.as_tensor(time, dtype=torch.float32), index)
                self.latents = scheduler.step(output, time, self.latents, **options)[0]
                yield index

    def _guided(self, model: Callable[..., Tensor], x: Tensor, time: Tensor, index: int) -> Tensor:
        once, guidance = time.expand(1), self.guidance
        is_guided = {"none": False, "interval": index >= 3, "toggled": index % 3 != 1}.get(guidance, True)
        if not is_guided:
            return model(x, once, self.text)
        if guidance == "batched":
            both = model(torch.cat([x, x]), time.expand(2), torch.cat([self.empty, self.text]))
            unconditional, conditional = both.chunk(2)
        elif guidance == "conditional first":
            conditional, unconditional = model(x, once, self.text), model(x, once, self.empty)
        else:
            unconditional, conditional = model(x, once, self.empty), model(x, once, self.text)
        return unconditional + SCALE * (conditional - unconditional)


def sampled(request: Request, model: Callable[..., Tensor]) -> Tensor:
    for _ in request.calls(model):
        pass
    return request.latents


def in_turn(requests: Sequence[Request], model: Callable[..., Tensor], order: Sequence[int]) -> list[Tensor]:
    """Each request makes its next step when it is its turn; those that are left finish in order."""
    running = [request.calls(model) for request in requests]
    for turn in order:
        next(running[turn], None)
    for rest in running:
        for _ in rest:
            pass
    return [request.latents for request in requests]
