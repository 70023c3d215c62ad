"""The trained models that quality is measured on: each with its sampler, and a classifier as the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lazy_compile.bench.tasks import digits, emoji, scenes
from lazy_compile.bench.tasks.digits import example_inputs
from lazy_compile.bench.tasks.emoji_judge import load_emoji_judge, sentence_embeddings
from lazy_compile.bench.tasks.training import default_checkpoints
from lazy_compile.runtime.sampling import Sampler


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: shown in tables.
        sampler_name: how it is sampled.
        model, example: the original, and the arguments of one call.
        sampler: ``(steps, batch) -> Sampler``.
        second_order: the same by DPM-Solver++ 2M.
        features: of images, ``float[B, F]``, for Fréchet distances.
        accuracy: share of the images of one sampling batch that are read as what was asked for.
        sigma: ``timestep -> share of noise`` on the way from data (0) to noise (1), by the model's time input.
        scores: further scores of one sampling batch, given the dense images from the same noise, by name.
        captions: of the rows of a sampling batch of that size.
    """

    name: str
    sampler_name: str
    model: nn.Module
    example: dict[str, Any]
    sampler: Callable[[int, int], Sampler]
    second_order: Callable[[int, int], Sampler]
    features: Callable[[Tensor], Tensor]
    accuracy: Callable[[Tensor], float]
    sigma: Callable[[float], float]
    scores: Callable[[Tensor, Tensor], dict[str, float]] = field(default=lambda images, dense: {})
    captions: Callable[[int], Sequence[str]] = field(default=lambda batch: [""] * batch)


def _flow_sigma(timestep: float) -> float:
    return timestep / 1000


def _digits_sigma(timestep: float) -> float:
    kept = float(digits.noise_schedule().alphas_cumprod[int(timestep)])
    return float((1 - kept) ** 0.5 / (kept**0.5 + (1 - kept) ** 0.5))


def digits_subject(batch: int = 16) -> Subject:
    """A class-conditional DiT, eps-prediction, DDIM, guidance 1.5."""
    folder = default_checkpoints("digits")
    judge = digits.load_or_train_digits_classifier(folder / "digits_classifier.safetensors")
    return Subject(
        "digits DiT",
        "DDIM",
        digits.load_or_train_digits_dit(folder / "digits_dit.safetensors"),
        example_inputs(batch),
        lambda steps, rows: digits.DigitsSampler(steps=steps, batch=rows),
        lambda steps, rows: digits.DigitsSampler(steps=steps, batch=rows, solver="dpm++2m"),
        judge.features,
        lambda images: judge.accuracy(images, digits.DigitsSampler().labels(len(images))),
        _digits_sigma,
    )


def scenes_subject(batch: int = 16) -> Subject:
    """A two-stream MMDiT, flow matching, Euler, guidance 2."""
    folder = default_checkpoints("scenes")
    judge = scenes.load_or_train_scenes_classifier(folder / "scenes_classifier.safetensors")
    prompt = scenes.prompts(scenes.ScenesSampler().words(batch))
    example = {
        "hidden_states": torch.zeros(batch, 3, scenes.SIZE, scenes.SIZE),
        "encoder_hidden_states": prompt,
        "pooled_projections": prompt.sum(1),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }
    return Subject(
        "scenes MMDiT",
        "flow matching, Euler",
        scenes.load_or_train_scenes_mmdit(folder / "scenes_mmdit.safetensors"),
        example,
        lambda steps, rows: scenes.ScenesSampler(steps=steps, batch=rows),
        lambda steps, rows: scenes.ScenesSampler(steps=steps, batch=rows, solver="dpm++2m"),
        judge.features,
        lambda images: judge.accuracy(images, scenes.classes_of(scenes.ScenesSampler().words(len(images)))),
        _flow_sigma,
    )


def emoji_subject(batch: int = 4) -> Subject:
    """A PixArt with cross-attention to captions, flow matching, Euler, guidance 3.

    Raises:
        ArtifactError: its weights are not there.
    """
    folder = default_checkpoints("emoji")
    model = emoji.load_emoji_pixart(folder / "emoji_pixart.safetensors")
    judge = load_emoji_judge(folder / "emoji_judge.safetensors")
    captions = emoji.Captions.load(folder / "emoji_captions.safetensors")
    embeddings, sampler = sentence_embeddings(captions.states, captions.mask), emoji.EmojiSampler(captions)

    def found(images: Tensor, among: int = 1) -> float:
        return judge.found(images, embeddings, sampler.rows(len(images)), among)

    def scores(images: Tensor, dense: Tensor) -> dict[str, float]:
        return {"among_five": found(images, 5), "perceptual": judge.perceptual_distance(images, dense)}

    return Subject(
        "emoji PixArt",
        "flow matching, Euler",
        model,
        emoji.example_inputs(captions, batch),
        lambda steps, rows: replace(sampler, steps=steps, batch=rows),
        lambda steps, rows: replace(sampler, steps=steps, batch=rows, solver="dpm++2m"),
        judge.features,
        found,
        _flow_sigma,
        scores,
        lambda rows: [captions.texts[row] for row in sampler.rows(rows).tolist()],
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "digits": digits_subject,
    "scenes": scenes_subject,
    "emoji": emoji_subject,
}
