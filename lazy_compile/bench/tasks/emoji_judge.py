"""A small network that says which caption a picture of an emoji belongs to; the judge of what the model draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile.bench.tasks.emoji import CAPTION_CHANNELS, SIZE
from lazy_compile.bench.tasks.training import load_checkpoint, seeded
from lazy_compile.errors import ArtifactError
from lazy_compile.progress import OnProgress, no_progress

CHANNELS = (3, 32, 64, 96, 128)
FEATURES = 128
JUDGE_TRAINING_STEPS = 1500
SHARPNESS = 30.0
"""Of the softmax over similarities."""


class EmojiJudge(nn.Module):
    """Pictures ``float[B, 3, 64, 64]`` in [-1, 1] to the embedding of their caption, ``float[B, 384]`` of length 1.

    Smaller pictures are enlarged.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(before, after, 3, padding=1, stride=2) for before, after in pairwise(CHANNELS)]
        self.convolutions = nn.ModuleList(layers)
        side = SIZE // 2 ** len(layers)
        self.body = nn.Linear(CHANNELS[-1] * side**2, FEATURES)
        self.head = nn.Linear(FEATURES, CAPTION_CHANNELS)

    def activations(self, images: Tensor) -> list[Tensor]:
        """After each convolution: ``float[B, C, H, W]``, C growing and H falling."""
        found: list[Tensor] = []
        if images.shape[-1] < SIZE:
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
        for layer in self.convolutions:
            images = F.relu(layer(images))
            found.append(images)
        return found

    def features(self, images: Tensor) -> Tensor:
        """Before the last layer, for Fréchet distances: ``float[B, 128]``."""
        return F.relu(self.body(self.activations(images)[-1].flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.features(images)), dim=1)

    @torch.no_grad()
    def found(self, images: Tensor, embeddings: Tensor, rows: Tensor, among: int = 1) -> float:
        """The share of pictures whose own caption is one of the `among` most similar.

        Args:
            images: ``float[B, 3, 64, 64]``.
            embeddings: of all captions, from `sentence_embeddings`.
            rows: the caption that each picture was asked for, ``int64[B]``.
            among: how many are looked at.
        """
        nearest = (self(images) @ embeddings.T).topk(among, dim=1).indices
        return float((nearest == rows[:, None]).any(1).float().mean())

    @torch.no_grad()
    def perceptual_distance(self, left: Tensor, right: Tensor) -> float:
        """How differently two sets of pictures activate this network, row by row.

        The squared difference of activations of length 1 at each place, averaged over places and convolutions: the
        form of LPIPS (Zhang et al., 2018), with this network and without learned weights.
        """
        pairs = zip(self.activations(left), self.activations(right), strict=True)
        apart = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in pairs]
        return float(torch.stack(apart).mean())


def sentence_embeddings(states: Tensor, mask: Tensor) -> Tensor:
    """One vector of length 1 for each caption but the last, the empty one, as all-MiniLM-L6-v2 defines it.

    Args:
        states: ``float[N + 1, TOKENS, 384]``.
        mask: ``bool[N + 1, TOKENS]``.
    """
    kept = mask[:-1, :, None]
    return F.normalize((states[:-1] * kept).sum(1) / kept.sum(1), dim=1)


def build_emoji_judge(seed: int = 0) -> EmojiJudge:
    """An untrained judge, 0.5 M parameters."""
    return seeded(EmojiJudge, seed)


def train_emoji_judge(
    model: EmojiJudge,
    images: Tensor,
    embeddings: Tensor,
    *,
    seed: int = 0,
    steps: int = JUDGE_TRAINING_STEPS,
    batch: int = 128,
    on_progress: OnProgress = no_progress,
) -> None:
    """Train in place to tell all captions apart; it sees every picture, shifted, blurred and with noise.

    Args:
        model: to train.
        images: all pictures, ``float[N, 3, 64, 64]`` in [-1, 1].
        embeddings: of their captions, in the same order.
        seed: of order and changes.
        steps: of AdamW.
        batch: pictures a step.
        on_progress: see :mod:`lazy_compile.progress`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:batch]
        similarity = model(_changed(images[rows], generator)) @ embeddings.T
        optimizer.zero_grad()
        F.cross_entropy(SHARPNESS * similarity, rows).backward()
        optimizer.step()
        schedule.step()
        on_progress("judge", step + 1, steps)


def _changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to four pixels, half of them blurred, and with noise of up to 0.3."""
    shifts: Sequence[int] = torch.randint(-4, 5, (2,), generator=generator).tolist()
    images = F.pad(images, (4, 4, 4, 4), value=1.0).roll(tuple(shifts), (2, 3))[:, :, 4:-4, 4:-4]
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
    share = torch.rand(len(images), 1, 1, 1, generator=generator) * 2 - 1
    images = images.lerp(blurred, share.clamp(min=0))
    amount = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.3
    return images + amount * torch.randn(images.shape, generator=generator)


def load_emoji_judge(path: Path) -> EmojiJudge:
    """The trained judge.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    if not path.exists():
        raise ArtifactError(f"no judge at {path}; train it with examples/emoji/train.py --judge")
    model = build_emoji_judge()
    load_checkpoint(model, path)
    return model
