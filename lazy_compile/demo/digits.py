"""A class-conditional diffusion transformer over scikit-learn's digits: real 8x8 scans, minutes to train.

The model is diffusers' own `DiTTransformer2DModel` (Peebles & Xie, 2023, "Scalable Diffusion Models with
Transformers"), trained to predict the noise and sampled by DDIM with classifier-free guidance.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile.errors import ArtifactError, import_optional
from lazy_compile.progress import OnProgress, no_progress, progress_bars
from lazy_compile.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

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


def noise_schedule() -> DDIMScheduler:
    """The schedule that the model is trained and sampled with; unclipped, so that more steps mean less error."""
    diffusers = import_optional("diffusers", "demo")
    return diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def build_digits_dit(seed: int = 0) -> DiTTransformer2DModel:
    """An untrained DiT: 6 blocks, 4 heads, 16 tokens of width 112, adaLN-zero, 1.6 M parameters, eval mode."""
    diffusers = import_optional("diffusers", "demo")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=28,
            in_channels=1,
            out_channels=1,
            num_layers=6,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=NUM_CLASSES,
        )
    # The "zero" of adaLN-zero, which diffusers leaves to the checkpoint: every block starts as the identity.
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model.eval()


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup_then_decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    average = import_optional("diffusers.training_utils", "demo").EMAModel(
        model.parameters(), decay=0.998, foreach=True
    )

    # Eval mode: in train mode each block would drop labels by a draw of its own, not together.
    model.eval()
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
        stratified = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (stratified * timesteps / batch).long().clamp(max=timesteps - 1)
        noise = torch.randn(batch, *images.shape[1:], generator=generator)
        noisy = schedule.add_noise(images[rows], noise, t)
        class_labels = labels[rows].masked_fill(dropped, NULL_CLASS)
        predicted = model(noisy, timestep=t, class_labels=class_labels, return_dict=False)[0]
        optimizer.zero_grad()
        F.mse_loss(predicted, noise).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup_then_decay.step()
        average.step(model.parameters())
        on_progress("training", step + 1, steps)
    average.copy_to(model.parameters())


@dataclass(frozen=True)
class DigitsSampler:
    """Classifier-free-guided DDIM (eta = 0), guided and unguided rows in one batch.

    A seed fixes the initial noise and the labels, whatever the denoiser and the number of steps.
    """

    steps: int = 20
    guidance_scale: float = 1.5
    batch: int = 64
    scheduler: Literal["ddim"] = "ddim"

    @torch.no_grad()
    def __call__(self, denoiser: Callable[..., Any], seed: int, batch: int | None = None) -> Tensor:
        """Images float[B, 1, 8, 8]; row i shows the digit `i % 10`.

        Each step calls `denoiser(hidden_states, timestep=..., class_labels=..., return_dict=False)[0]` once,
        on 2B rows: B with their label, then the same B with the null label.
        """
        batch = self.batch if batch is None else batch
        schedule = noise_schedule()
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


class DigitsClassifier(nn.Module):
    """A small convolutional classifier: float[B, 1, 8, 8] -> logits float[B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Activations before the last layer: float[B, 32]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images whose most likely class is their label."""
        return float((self(images).argmax(1) == labels).float().mean())


def train_digits_classifier(seed: int = 0, steps: int = CLASSIFIER_TRAINING_STEPS) -> DigitsClassifier:
    """A classifier trained on the scans outside `HELD_OUT`, in eval mode; takes seconds."""
    images, labels = load_digits_tensor()
    seen = torch.ones(len(images), dtype=torch.bool)
    seen[HELD_OUT] = False
    images, labels = images[seen], labels[seen]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval()


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


def save_checkpoint(model: nn.Module, path: Path, *, seed: int, steps: int) -> None:
    """Write the weights as safetensors, whole or not at all; the header says which training they come from."""
    # One entry: safetensors writes several in an order that changes from run to run.
    training = json.dumps({"seed": seed, "steps": steps, "torch": torch.__version__})
    save_tensors(path, model.state_dict(), {"training": training})


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Read the weights into `model`; a damaged file, or one of another model, is an `ArtifactError`."""
    tensors, _ = load_tensors(path)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise ArtifactError(
            f"{path} is not a checkpoint of this {type(model).__name__}: {len(differing)} tensors differ, "
            f"first {name!r}: saw {found.get(name)}, expected {expected.get(name)}; delete it to train again"
        )
    model.load_state_dict(tensors)


def load_or_train_digits_dit(
    checkpoint: Path | None, *, seed: int = 0, steps: int = DIT_TRAINING_STEPS, progress: bool = True
) -> DiTTransformer2DModel:
    """The trained model: read from `checkpoint` if that exists, else trained and, given a path, written there."""
    model = build_digits_dit(seed)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(model, checkpoint)
        return model
    if progress:
        missing = "no checkpoint given" if checkpoint is None else f"no checkpoint at {checkpoint}"
        print(f"{missing}: training the digits model, about five minutes on two cores", file=sys.stderr)
    with progress_bars(progress) as on_progress:
        train_digits_dit(model, seed=seed, steps=steps, on_progress=on_progress)
    if checkpoint is not None:
        save_checkpoint(model, checkpoint, seed=seed, steps=steps)
    return model


def load_or_train_digits_classifier(checkpoint: Path | None, *, seed: int = 0) -> DigitsClassifier:
    """The trained classifier: read from `checkpoint` if that exists, else trained and, given a path, written there."""
    if checkpoint is not None and checkpoint.exists():
        model = DigitsClassifier().eval()
        load_checkpoint(model, checkpoint)
        return model
    model = train_digits_classifier(seed)
    if checkpoint is not None:
        save_checkpoint(model, checkpoint, seed=seed, steps=CLASSIFIER_TRAINING_STEPS)
    return model
