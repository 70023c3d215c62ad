"""A two-stream diffusion transformer over small colour scenes: flow matching, 64 image tokens beside 3 of a prompt.

A scene is a coloured shape in front of a crop of one of the two photographs that scikit-learn ships; its prompt says
which shape, which colour, which photograph. The model is diffusers' own `SD3Transformer2DModel` (Esser et al., 2024,
"Scaling Rectified Flow Transformers", MMDiT), sampled by Euler steps with classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lazy_compile.bench.tasks.flow import FlowSolver, flow_schedule, sample_flow
from lazy_compile.bench.tasks.training import (
    Classifier,
    load_or_train,
    seeded,
    set_to_zero,
    train_classifier,
    train_denoiser,
)
from lazy_compile.errors import import_optional
from lazy_compile.progress import OnProgress, no_progress

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

SIZE = 16
SHAPES = ("disc", "square", "triangle", "ring")
COLOURS = {
    "red": (0.9, -0.8, -0.8), "green": (-0.8, 0.7, -0.7), "blue": (-0.8, -0.6, 0.9),
    "yellow": (0.9, 0.8, -0.8), "white": (1.0, 1.0, 1.0), "black": (-1.0, -1.0, -1.0),
}  # fmt: skip
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
WORDS = len(SHAPES) + len(COLOURS) + len(PHOTOGRAPHS)
CLASSES = len(SHAPES) * len(COLOURS)
PROMPT_DROPOUT = 0.1
MMDIT_TRAINING_STEPS = 5000
CLASSIFIER_TRAINING_STEPS = 2000


@dataclass(frozen=True)
class Scenes:
    """Images ``float[N, 3, 16, 16]`` in [-1, 1], and ``int64[N, 3]``: shape, colour and photograph of each."""

    images: Tensor
    words: Tensor

    @property
    def classes(self) -> Tensor:
        """``int64[N]``: shape and colour as one number below :data:`CLASSES`."""
        return classes_of(self.words)


def classes_of(words: Tensor) -> Tensor:
    return words[:, 0] * len(COLOURS) + words[:, 1]


class SceneSource:
    """Draws scenes without end: any number of them, each new."""

    def __init__(self) -> None:
        datasets = import_optional("sklearn.datasets", "demo")
        photographs = [torch.tensor(datasets.load_sample_image(name)).permute(2, 0, 1) for name in PHOTOGRAPHS]
        small = [F.adaptive_avg_pool2d(photograph.float() / 127.5 - 1, (48, 72)) for photograph in photographs]
        self._photographs = torch.stack(small)

    def draw(self, count: int, generator: torch.Generator) -> Scenes:
        sizes = (len(SHAPES), len(COLOURS), len(PHOTOGRAPHS))
        words = torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)
        return Scenes(self._paint(words, torch.rand(count, 5, generator=generator)), words)

    def _paint(self, words: Tensor, chance: Tensor) -> Tensor:
        """``chance``: float[N, 5] in [0, 1), the place of the crop, and the place and size of the shape."""
        height, width = (extent - SIZE + 1 for extent in self._photographs.shape[-2:])
        rows = (chance[:, 0] * height).long()[:, None] + torch.arange(SIZE)
        columns = (chance[:, 1] * width).long()[:, None] + torch.arange(SIZE)
        crops = self._photographs[words[:, 2, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        centre = (chance[:, 2:4] - 0.5) * 0.7
        mask = _coverage(words[:, 0], centre, 0.35 + 0.25 * chance[:, 4]).unsqueeze(1)
        colours = torch.tensor(list(COLOURS.values()))[words[:, 1]]
        return crops * (1 - mask) + colours[:, :, None, None] * mask


def _coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """float[N, 16, 16]: how much of each pixel a shape covers; the image spans [-1, 1] both ways."""
    pixel = 2 / SIZE
    place = (torch.arange(SIZE) + 0.5) * pixel - 1
    y, x = place[None, :, None] - centre[:, 0, None, None], place[None, None, :] - centre[:, 1, None, None]
    size = radius[:, None, None]
    from_centre = (x.square() + y.square()).sqrt()
    outside = torch.stack(
        [
            from_centre - size,
            torch.maximum(x.abs(), y.abs()) - 0.85 * size,
            torch.maximum(0.87 * x.abs() - 0.5 * y, y) - 0.6 * size,
            (from_centre - 0.8 * size).abs() - 0.3 * size,
        ]
    )
    chosen = outside.gather(0, shape[None, :, None, None].expand(1, -1, SIZE, SIZE))[0]
    return (0.5 - chosen / pixel).clamp(0, 1)


def prompts(words: Tensor) -> Tensor:
    """float[N, 3, WORDS]: one one-hot token each for the shape, the colour and the photograph."""
    offsets = torch.tensor([0, len(SHAPES), len(SHAPES) + len(COLOURS)])
    return F.one_hot(words + offsets, WORDS).float()


def build_scenes_mmdit(seed: int = 0) -> SD3Transformer2DModel:
    """An untrained MMDiT: 6 two-stream blocks, 4 heads, width 96, adaLN-zero, 1.9 M parameters, eval mode."""
    diffusers = import_optional("diffusers", "demo")
    model: SD3Transformer2DModel = seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=SIZE,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=6,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=WORDS,
            caption_projection_dim=96,
            pooled_projection_dim=WORDS,
            pos_embed_max_size=SIZE // 2,
            qk_norm="rms_norm",
        ),
        seed,
    )
    modulations = [block.norm1.linear for block in model.transformer_blocks]
    modulations += [block.norm1_context.linear for block in model.transformer_blocks]
    set_to_zero([*modulations, model.norm_out.linear, model.proj_out])
    return model


def train_scenes_mmdit(
    model: SD3Transformer2DModel,
    *,
    seed: int = 0,
    steps: int = MMDIT_TRAINING_STEPS,
    batch: int = 48,
    learning_rate: float = 2e-3,
    on_progress: OnProgress = no_progress,
) -> None:
    """Train `model` in place to predict the velocity `noise - image`; it ends with the moving average of its weights.

    The same seed, thread count and torch build give the same weights.
    """
    source, generator = SceneSource(), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        scenes = source.draw(batch, generator)
        kept = torch.rand(batch, generator=generator) >= PROMPT_DROPOUT
        prompt = prompts(scenes.words) * kept[:, None, None]
        sigma = torch.sigmoid(torch.randn(batch, generator=generator))
        noise = torch.randn(scenes.images.shape, generator=generator)
        noisy = torch.lerp(scenes.images, noise, sigma[:, None, None, None])
        predicted = model(noisy, prompt, prompt.sum(1), timestep=sigma * 1000, return_dict=False)[0]
        return F.mse_loss(predicted, noise - scenes.images)

    train_denoiser(model, loss, steps=steps, learning_rate=learning_rate, on_progress=on_progress)


@dataclass(frozen=True)
class ScenesSampler:
    """Classifier-free-guided steps of Euler or DPM-Solver++ 2M over the flow, guided and unguided rows in one batch.

    A seed fixes the initial noise and the prompts, whatever the denoiser and the number of steps.
    """

    steps: int = 20
    guidance_scale: float = 2.0
    batch: int = 48
    solver: FlowSolver = "euler"

    @torch.no_grad()
    def __call__(self, denoiser: Callable[..., Any], seed: int, batch: int | None = None) -> Tensor:
        """Images float[B, 3, 16, 16]; row i shows the scene `words()[i]`.

        Each step calls the denoiser once, on 2B rows: B with their prompt, then the same B with an empty one.
        """
        batch = self.batch if batch is None else batch
        prompt = prompts(self.words(batch))
        prompt = torch.cat([prompt, torch.zeros_like(prompt)])

        def velocity(images: Tensor, timestep: Tensor) -> Tensor:
            predicted: Tensor = denoiser(
                images,
                encoder_hidden_states=prompt,
                pooled_projections=prompt.sum(1),
                timestep=timestep,
                return_dict=False,
            )[0]
            return predicted

        noise = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        return sample_flow(velocity, noise, flow_schedule(self.solver, self.steps), self.guidance_scale)

    def words(self, batch: int | None = None) -> Tensor:
        """What each row of a sample shows, balanced over shapes, colours and photographs: int64[B, 3]."""
        row = torch.arange(self.batch if batch is None else batch)
        shape, rest = row % len(SHAPES), row // len(SHAPES)
        return torch.stack([shape, (rest + shape) % len(COLOURS), rest // len(COLOURS) % len(PHOTOGRAPHS)], dim=1)


def build_scenes_classifier(seed: int = 0) -> Classifier:
    """An untrained judge of shape and colour."""
    return seeded(lambda: Classifier((3, 32, 64, 64), SIZE, CLASSES), seed)


def train_scenes_classifier(model: Classifier, *, seed: int = 0, steps: int = CLASSIFIER_TRAINING_STEPS) -> None:
    """Train in place on scenes of its own; takes half a minute."""
    source, generator = SceneSource(), torch.Generator().manual_seed(seed + 1)

    def draw() -> tuple[Tensor, Tensor]:
        scenes = source.draw(128, generator)
        return scenes.images, scenes.classes

    train_classifier(model, draw, steps=steps)


def load_or_train_scenes_mmdit(
    checkpoint: Path, *, seed: int = 0, steps: int = MMDIT_TRAINING_STEPS, progress: bool = True
) -> SD3Transformer2DModel:
    """The trained model: read from `checkpoint` if that exists, else trained and written there."""
    model = build_scenes_mmdit(seed)
    return load_or_train(
        model,
        checkpoint,
        lambda on_progress: train_scenes_mmdit(model, seed=seed, steps=steps, on_progress=on_progress),
        seed=seed,
        steps=steps,
        told="the scenes model, about 25 minutes",
        progress=progress,
    )


def load_or_train_scenes_classifier(checkpoint: Path, *, seed: int = 0) -> Classifier:
    """The trained classifier: read from `checkpoint` if that exists, else trained and written there."""
    model = build_scenes_classifier(seed)
    return load_or_train(
        model,
        checkpoint,
        lambda _: train_scenes_classifier(model, seed=seed),
        seed=seed,
        steps=CLASSIFIER_TRAINING_STEPS,
    )
