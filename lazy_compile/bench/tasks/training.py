"""What the example models share: a training loop, a small judge of images, checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile.errors import ArtifactError, import_optional
from lazy_compile.progress import OnProgress, no_progress, progress_bars
from lazy_compile.storage import load_tensors, save_tensors

ModelT = TypeVar("ModelT", bound=nn.Module)


def default_checkpoints(model: str) -> Path:
    """``examples/MODEL`` of a source tree, else a folder of the user's cache."""
    examples = Path(__file__).resolve().parents[3] / "examples" / model
    if examples.is_dir():
        return examples
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazy_compile" / model


def seeded(build: Callable[[], ModelT], seed: int) -> ModelT:
    """A model with the initial weights of that seed, in eval mode; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().eval()


def set_to_zero(layers: Sequence[nn.Module]) -> None:
    """The "zero" of adaLN-zero, which diffusers leaves to the checkpoint: every block starts as the identity."""
    for layer in layers:
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def train_denoiser(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    on_progress: OnProgress = no_progress,
) -> None:
    """Minimise `loss`, which draws its own batch, in place; `model` ends with the moving average of its weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup_then_decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    average = import_optional("diffusers.training_utils", "demo").EMAModel(
        model.parameters(), decay=0.998, foreach=True
    )
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup_then_decay.step()
        average.step(model.parameters())
        on_progress("training", step + 1, steps)
    average.copy_to(model.parameters())


class Classifier(nn.Module):
    """A small convolutional classifier of square images: float[B, channels[0], side, side] -> logits float[B, classes].

    Args:
        channels: of the image, then of each convolution; all but the first halve the side.
        side: of the image, in pixels.
        classes: how many there are.
    """

    def __init__(self, channels: Sequence[int], side: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth, (before, after) in enumerate(pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, stride=1 if depth == 0 else 2), nn.ReLU()]
        side //= 2 ** (len(channels) - 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, 32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def features(self, images: Tensor) -> Tensor:
        """Activations before the last layer: float[B, 32]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.no_grad()
    def accuracy(self, images: Tensor, classes: Tensor) -> float:
        """The share of images whose most likely class is the one asked for."""
        return float((self(images).argmax(1) == classes).float().mean())


def train_classifier(model: Classifier, draw: Callable[[], tuple[Tensor, Tensor]], *, steps: int) -> None:
    """Train in place on images and classes that `draw` gives; takes seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        images, classes = draw()
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()


def save_checkpoint(model: nn.Module, path: Path, *, seed: int, steps: int, **more: int) -> None:
    """Write the weights as safetensors, whole or not at all; the header says which training they come from."""
    # One entry: safetensors writes several in an order that changes from run to run.
    training = json.dumps({"seed": seed, "steps": steps, **more, "torch": torch.__version__})
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


def load_or_train(
    model: ModelT,
    checkpoint: Path | None,
    train: Callable[[OnProgress], None],
    *,
    seed: int,
    steps: int,
    told: str = "",
    progress: bool = False,
) -> ModelT:
    """`model` with the weights of `checkpoint` if that exists, else trained and, given a path, written there.

    Args:
        model: with its initial weights.
        checkpoint: where its trained weights lie, or go.
        train: trains it in place.
        seed: and ``steps``: what is noted of the training in the file.
        told: what is trained and how long that takes, for a line on stderr in front of the progress bar.
        progress: whether to show both.
    """
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(model, checkpoint)
        return model
    if progress:
        missing = "no checkpoint given" if checkpoint is None else f"no checkpoint at {checkpoint}"
        print(f"{missing}: training {told}", file=sys.stderr)
    with progress_bars(progress) as on_progress:
        train(on_progress)
    if checkpoint is not None:
        save_checkpoint(model, checkpoint, seed=seed, steps=steps)
    return model


def training_options(description: str | None, steps: int, folder: Path) -> argparse.Namespace:
    """``--seed``, ``--steps`` and ``--output`` of a training script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, batches and noise (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=folder,
        metavar="FOLDER",
        help="where the two checkpoints go, over those that lie there (default: the folder of this script)",
    )
    return parser.parse_args()
