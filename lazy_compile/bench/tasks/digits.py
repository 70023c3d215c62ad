"""A class-conditional diffusion transformer over scikit-learn's digits: real 8x8 scans, minutes to train.

The model is diffusers' own `DiTTransformer2DModel` (Peebles & Xie, 2023, "Scalable Diffusion Models with
Transformers"), trained to predict the noise and sampled by DDIM with classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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
    from diffusers import DiTTransformer2DModel

Solver = Literal["ddim", "dpm++2m"]

NUM_CLASSES = 10
NULL_CLASS = NUM_CLASSES  # diffusers' `LabelEmbedding` keeps its last row for "no label"
LABEL_DROPOUT = 0.1
DIT_TRAINING_STEPS = 4000
CLASSIFIER_TRAINING_STEPS = 600
HELD_OUT = slice(0, None, 5)  # every fifth scan: the classifier never trains on these


def load_digits_tensor() -> tuple[Tensor, Tensor]:
    """Images as float[N, 1, 8, 8] in [-1, 1] and labels as int64[N], N = 1797."""
    digits = import_optional("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(digits.target).long()


def noise_schedule(solver: Solver = "ddim") -> Any:
    """The schedule that the model is trained and sampled with; unclipped, so that more steps mean less error."""
    diffusers = import_optional("diffusers", "demo")
    if solver == "dpm++2m":
        return diffusers.DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_schedule="linear")
    return diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def build_digits_dit(seed: int = 0) -> DiTTransformer2DModel:
    """An untrained DiT: 6 blocks, 4 heads, 16 tokens of width 112, adaLN-zero, 1.6 M parameters, eval mode."""
    diffusers = import_optional("diffusers", "demo")
    model: DiTTransformer2DModel = seeded(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=28,
            in_channels=1,
            out_channels=1,
            num_layers=6,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=NUM_CLASSES,
        ),
        seed,
    )
    set_to_zero([*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2])
    return model


def train_digits_dit(
    model: DiTTransformer2DModel,
    *,
    seed: int = 0,
    steps: int = DIT_TRAINING_STEPS,
    batch: int = 64,
    learning_rate: float = 1e-3,
    on_progress: OnProgress = no_progress,
) -> None:
    """Train `model` in place to predict the noise; it ends with the moving average of its weights.

    The same seed, thread count and torch build give the same weights.
    """
    images, labels = load_digits_tensor()
    schedule = noise_schedule()
    timesteps = schedule.config.num_train_timesteps
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
        stratified = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (stratified * timesteps / batch).long().clamp(max=timesteps - 1)
        noise = torch.randn(batch, *images.shape[1:], generator=generator)
        noisy = schedule.add_noise(images[rows], noise, t)
        class_labels = labels[rows].masked_fill(dropped, NULL_CLASS)
        return F.mse_loss(model(noisy, timestep=t, class_labels=class_labels, return_dict=False)[0], noise)

    model.eval()  # in train mode each block would drop labels by a draw of its own, not together
    train_denoiser(model, loss, steps=steps, learning_rate=learning_rate, on_progress=on_progress)


@dataclass(frozen=True)
class DigitsSampler:
    """Classifier-free-guided DDIM (eta = 0) or DPM-Solver++ 2M, guided and unguided rows in one batch.

    A seed fixes the initial noise and the labels, whatever the denoiser and the number of steps.
    """

    steps: int = 20
    guidance_scale: float = 1.5
    batch: int = 64
    solver: Solver = "ddim"

    @torch.no_grad()
    def __call__(self, denoiser: Callable[..., Any], seed: int, batch: int | None = None) -> Tensor:
        """Images float[B, 1, 8, 8]; row i shows the digit `i % 10`.

        Each step calls `denoiser(hidden_states, timestep=..., class_labels=..., return_dict=False)[0]` once,
        on 2B rows: B with their label, then the same B with the null label.
        """
        batch = self.batch if batch is None else batch
        schedule = noise_schedule(self.solver)
        schedule.set_timesteps(self.steps)
        images = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        class_labels = torch.cat([self.labels(batch), torch.full((batch,), NULL_CLASS)])
        for t in schedule.timesteps:
            noise = denoiser(
                torch.cat([images, images]), timestep=t.repeat(2 * batch), class_labels=class_labels, return_dict=False
            )[0]
            guided, unguided = noise.chunk(2)
            noise = unguided + self.guidance_scale * (guided - unguided)
            images = schedule.step(noise, t, images, return_dict=False)[0]
        return images

    def labels(self, batch: int | None = None) -> Tensor:
        """The digit that each row of a sample shows: int64[B], balanced over the ten classes."""
        return torch.arange(self.batch if batch is None else batch) % NUM_CLASSES


def build_digits_classifier(seed: int = 0) -> Classifier:
    """An untrained judge of 8x8 scans."""
    return seeded(lambda: Classifier((1, 32, 64), 8, NUM_CLASSES), seed)


def train_digits_classifier(model: Classifier, *, seed: int = 0, steps: int = CLASSIFIER_TRAINING_STEPS) -> None:
    """Train in place on the scans outside `HELD_OUT`; takes seconds."""
    images, labels = load_digits_tensor()
    seen = torch.ones(len(images), dtype=torch.bool)
    seen[HELD_OUT] = False
    images, labels = images[seen], labels[seen]
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (128,), generator=generator)
        return images[rows], labels[rows]

    train_classifier(model, draw, steps=steps)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to float[N, F] and float[M, F], in float64.

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)). With cov = root^T root the last
    trace is the nuclear norm of root_a root_b^T, which needs no inverse: singular covariances are fine.
    """
    mean_a, root_a = _mean_and_covariance_root(features_a)
    mean_b, root_b = _mean_and_covariance_root(features_b)
    overlap = torch.linalg.matrix_norm(root_a @ root_b.T, ord="nuc")
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(float(distance), 0.0)


def _mean_and_covariance_root(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.detach().double()
    mean = features.mean(0)
    root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
    return mean, root


def load_or_train_digits_dit(
    checkpoint: Path | None, *, seed: int = 0, steps: int = DIT_TRAINING_STEPS, progress: bool = True
) -> DiTTransformer2DModel:
    """The trained model: read from `checkpoint` if that exists, else trained and, given a path, written there."""
    model = build_digits_dit(seed)
    return load_or_train(
        model,
        checkpoint,
        lambda on_progress: train_digits_dit(model, seed=seed, steps=steps, on_progress=on_progress),
        seed=seed,
        steps=steps,
        told="the digits model, about five minutes on two cores",
        progress=progress,
    )


def load_or_train_digits_classifier(checkpoint: Path | None, *, seed: int = 0) -> Classifier:
    """The trained classifier: read from `checkpoint` if that exists, else trained and, given a path, written there."""
    model = build_digits_classifier(seed)
    return load_or_train(
        model,
        checkpoint,
        lambda _: train_digits_classifier(model, seed=seed),
        seed=seed,
        steps=CLASSIFIER_TRAINING_STEPS,
    )


def example_inputs(rows: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(rows, 1, 8, 8),
        "timestep": torch.full((rows,), 500),
        "class_labels": torch.zeros(rows, dtype=torch.long),
        "return_dict": False,
    }
