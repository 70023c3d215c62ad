"""The trained models that quality is measured on: each with its sampler, and a classifier as the judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lazy_compile.bench.tasks import digits, scenes
from lazy_compile.bench.tasks.digits import default_checkpoints, example_inputs
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
    """

    name: str
    sampler_name: str
    model: nn.Module
    example: dict[str, Any]
    sampler: Callable[[int, int], Sampler]
    second_order: Callable[[int, int], Sampler]
    features: Callable[[Tensor], Tensor]
    accuracy: Callable[[Tensor], float]


def digits_subject(batch: int = 16) -> Subject:
    """A class-conditional DiT, eps-prediction, DDIM, guidance 1.5."""
    folder = default_checkpoints()
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
    )


def scenes_subject(batch: int = 16) -> Subject:
    """A two-stream MMDiT, flow matching, Euler, guidance 2."""
    folder = default_checkpoints().with_name("scenes")
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
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {"digits": digits_subject, "scenes": scenes_subject}
