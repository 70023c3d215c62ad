"""Training of the emoji model: coarse pictures first, Muon for the matrices, a state that a stopped run resumes from.

The time a run is given may end at any moment, so the learning rate is constant and the moving average of the weights,
which looks further back as training goes on, stands for its decay.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile.bench.tasks.emoji import Captions
from lazy_compile.bench.tasks.training import load_checkpoint, save_checkpoint
from lazy_compile.errors import import_optional
from lazy_compile.storage import atomic_path, load_tensors, parse_json

CAPTION_DROPOUT = 0.1
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Stage:
    """Pictures of `size` pixels in batches of `batch`, until `epochs` in all have been seen."""

    size: int
    batch: int
    epochs: float


STAGES = (Stage(16, 128, 80), Stage(32, 96, 500), Stage(64, 64, 1500))


@dataclass(frozen=True)
class Pictures:
    """What is learned: `images` ``uint8[N, 3, 64, 64]``, `states` ``float[N + 1, TOKENS, 384]`` of their captions and
    `mask` ``bool[N + 1, TOKENS]``; the last row of both is the empty caption.
    """

    images: Tensor
    states: Tensor
    mask: Tensor

    @classmethod
    def of(cls, texts: Sequence[str], images: Tensor, captions: Captions) -> Pictures:
        """The drawn pictures whose captions are known; another release of the font may have drawn more."""
        place = {text: row for row, text in enumerate(captions.texts)}
        kept = [row for row, text in enumerate(texts) if text in place]
        rows = [place[texts[row]] for row in kept] + [place[""]]
        return cls(images[kept], captions.states[rows], captions.mask[rows])

    def at(self, size: int) -> Tensor:
        """All pictures in [-1, 1] at `size` pixels: ``float[N, 3, size, size]``."""
        images = self.images.float() / 127.5 - 1
        return F.adaptive_avg_pool2d(images, (size, size)) if size < images.shape[-1] else images


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices (Jordan et al., 2024, "Muon: an optimizer for hidden layers").

    `torch.optim.Muon` does the same one matrix at a time and in bfloat16, which CPUs without bfloat16 instructions
    emulate; here matrices of one shape are iterated on together, in their own precision.

    Args:
        params: matrices.
        lr: of an update whose singular values are about 1, times ``sqrt(max(1, rows / columns))``.
        momentum: of the moving average of gradients; Nesterov.
        weight_decay: decoupled, times `lr`.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = orthogonal(torch.stack([self._direction(p, group["momentum"]) for p in parameters]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        average = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """``float[K, N, M]`` with its singular values brought near 1, by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class EmojiTrainer:
    """Trains a PixArt in place; `average` is what to sample from.

    Everything that a step draws follows from the seed and the number of the step, so a resumed run goes on as if it
    had not stopped.

    Args:
        model: from `build_emoji_pixart`.
        pictures: to learn.
        seed: of order, noise and times.
        stages: pictures from coarse to fine.
    """

    def __init__(
        self, model: nn.Module, pictures: Pictures, *, seed: int = 0, stages: Sequence[Stage] = STAGES
    ) -> None:
        self.model, self.pictures, self.seed, self.stages = model, pictures, seed, stages
        matrices = [p for name, p in model.named_parameters() if _is_hidden_matrix(name, p)]
        others = [p for name, p in model.named_parameters() if not _is_hidden_matrix(name, p)]
        self.optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95))]
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.average = import_optional("diffusers.training_utils", "emoji").EMAModel(
            model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True
        )
        self.step, self.images_seen, self.warm_since = 0, 0, 0
        self._size, self._images = 0, pictures.images

    @property
    def epochs(self) -> float:
        return self.images_seen / len(self.pictures.images)

    @property
    def stage(self) -> Stage | None:
        """What is learned now; nothing after the last stage."""
        return next((stage for stage in self.stages if self.epochs < stage.epochs), None)

    def run(self, on_step: Callable[[float], None]) -> None:
        """Train to the end of the last stage; `on_step` gets the loss of every step."""
        while (stage := self.stage) is not None:
            on_step(self.train_step(stage))

    def train_step(self, stage: Stage) -> float:
        warmup = min(1.0, (self.step - self.warm_since + 1) / WARMUP_STEPS)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * warmup
        loss = self.loss(stage)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.step(self.model.parameters())
        self.step += 1
        self.images_seen += stage.batch
        return float(loss.detach())

    def loss(self, stage: Stage) -> Tensor:
        """Flow matching: the mean squared error of the velocity ``noise - image``, times logit-normal."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        rows = epochs_of(self.images_seen, stage.batch, len(self.pictures.images), self.seed)
        images = self._at(stage.size)[rows]
        dropped = torch.rand(stage.batch, generator=generator) < CAPTION_DROPOUT
        captions = rows.masked_fill(dropped, len(self.pictures.images))
        longest = int(self.pictures.mask[captions].sum(1).max())
        sigma = _times(stage, generator)
        noise = torch.randn(images.shape, generator=generator)
        velocity = self.model(
            torch.lerp(images, noise, sigma[:, None, None, None]),
            encoder_hidden_states=self.pictures.states[captions, :longest],
            encoder_attention_mask=self.pictures.mask[captions, :longest],
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - images)

    def _at(self, size: int) -> Tensor:
        if size != self._size:
            self._size, self._images = size, self.pictures.at(size)
        return self._images

    def save(self, path: Path) -> None:
        """Write all that a later run goes on from, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": [self.step, self.images_seen, self.warm_since],
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step, self.images_seen, self.warm_since = state["progress"]

    def export(self, path: Path) -> None:
        """Write the moving average of the weights in half precision, for `load_emoji_pixart` and `resume`."""
        model = copy.deepcopy(self.model)
        self.average.copy_to(model.parameters())
        save_checkpoint(model.half(), path, seed=self.seed, steps=self.step, images_seen=self.images_seen)

    def resume(self, path: Path) -> None:
        """Go on from what `export` wrote: from the moving average, with fresh optimizers that warm up again."""
        load_checkpoint(self.model, path)
        training = parse_json(load_tensors(path)[1]["training"], path)
        self.step = self.warm_since = training["steps"]
        self.images_seen = training["images_seen"]
        self.average.shadow_params = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.average.optimization_step = self.step


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("transformer_blocks") and name.endswith("weight") and parameter.ndim == 2


def epochs_of(start: int, count: int, pictures: int, seed: int) -> Tensor:
    """Rows `start` to `start + count` of an endless sequence of shuffled epochs: ``int64[count]``."""
    epochs = range(start // pictures, (start + count - 1) // pictures + 1)
    shuffled = [torch.randperm(pictures, generator=torch.Generator().manual_seed(seed + epoch)) for epoch in epochs]
    return torch.cat(shuffled)[start % pictures :][:count]


def _times(stage: Stage, generator: torch.Generator) -> Tensor:
    """Noise levels, one from each of as many equal shares of a logit-normal; larger pictures get more noise."""
    share = (torch.arange(stage.batch) + torch.rand(stage.batch, generator=generator)) / stage.batch
    mean = 0.5 * torch.tensor(stage.size / 32).log2()
    return torch.sigmoid(torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)) + mean)


class Pace:
    """Prints how training goes, and saves its state every so often.

    Args:
        trainer: whose.
        path: of the state.
        seconds: between two states.
        steps: between two lines.
    """

    def __init__(self, trainer: EmojiTrainer, path: Path, *, seconds: float = 180, steps: int = 50) -> None:
        self.trainer, self.path, self.seconds, self.steps = trainer, path, seconds, steps
        self._saved = self._printed = time.monotonic()
        self._losses: list[float] = []

    def __call__(self, loss: float) -> None:
        trainer, now = self.trainer, time.monotonic()
        self._losses.append(loss)
        if trainer.step % self.steps == 0:
            mean, pace = sum(self._losses) / len(self._losses), len(self._losses) / (now - self._printed)
            size = trainer.stage.size if trainer.stage else 0
            text = (
                f"step {trainer.step}, {trainer.epochs:.1f} epochs, {size} pixels: loss {mean:.4f}, {pace:.2f} steps/s"
            )
            print(text, flush=True)
            self._losses, self._printed = [], now
        if now - self._saved > self.seconds:
            trainer.save(self.path)
            self._saved = now
