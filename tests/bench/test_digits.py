"""The digits example: what it draws is fixed by its seed, and its checkpoints are read whole or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazy_compile.bench.tasks import digits
from lazy_compile.bench.tasks.digits import DigitsSampler, frechet_distance
from lazy_compile.bench.tasks.training import save_checkpoint
from lazy_compile.errors import ArtifactError
from lazy_compile.storage import load_tensors

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "digits"


class RecordingDenoiser:
    """Predicts no noise for a labelled row and `unguided` for an unlabelled one; keeps what it was called with."""

    def __init__(self, unguided: float = 0.0) -> None:
        self.unguided = unguided
        self.calls: list[dict[str, Any]] = []

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        self.calls.append({"hidden_states": hidden_states, **kwargs})
        is_null = kwargs["class_labels"] == digits.NULL_CLASS
        return (torch.zeros_like(hidden_states) + self.unguided * is_null[:, None, None, None],)


def trained_state(seed: int = 0) -> dict[str, Tensor]:
    model = digits.build_digits_dit(seed)
    digits.train_digits_dit(model, seed=seed, steps=2)
    return dict(model.state_dict())


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys, lazy_compile.bench.tasks.digits;"
        "print({'diffusers', 'sklearn', 'torchmetrics', 'scipy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


def test_scans_are_images_in_minus_one_to_one() -> None:
    images, labels = digits.load_digits_tensor()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))


def test_untrained_model_predicts_zero() -> None:
    model = digits.build_digits_dit()
    images = torch.randn(3, 1, 8, 8)
    labels = torch.tensor([0, 9, digits.NULL_CLASS])
    (noise,) = model(images, timestep=torch.tensor([0, 500, 999]), class_labels=labels, return_dict=False)
    assert torch.equal(noise, torch.zeros_like(images))


def test_training_is_fixed_by_its_seed() -> None:
    first, again, other = (trained_state(seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    trained_state()
    digits.train_digits_classifier(digits.build_digits_classifier(), steps=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampler_calls_the_denoiser_once_a_step_on_guided_then_unguided_rows() -> None:
    denoiser = RecordingDenoiser()
    samples = DigitsSampler(steps=4)(denoiser, seed=0, batch=12)
    assert samples.shape == (12, 1, 8, 8)
    assert len(denoiser.calls) == 4
    call = denoiser.calls[0]
    assert torch.equal(call["hidden_states"][:12], call["hidden_states"][12:])
    assert call["timestep"].tolist() == [750] * 24
    assert call["class_labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, *[digits.NULL_CLASS] * 12]


def test_same_seed_gives_the_same_noise_and_labels_for_any_number_of_steps() -> None:
    few, many, other = RecordingDenoiser(), RecordingDenoiser(), RecordingDenoiser()
    DigitsSampler(steps=2)(few, seed=3)
    DigitsSampler(steps=5)(many, seed=3)
    DigitsSampler(steps=2)(other, seed=4)
    assert torch.equal(few.calls[0]["hidden_states"], many.calls[0]["hidden_states"])
    assert torch.equal(few.calls[0]["class_labels"], many.calls[0]["class_labels"])
    assert not torch.equal(few.calls[0]["hidden_states"], other.calls[0]["hidden_states"])


@pytest.mark.parametrize(("scale", "changes"), [(1.0, False), (1.5, True)])
def test_unguided_rows_count_only_when_guidance_differs_from_one(scale: float, changes: bool) -> None:
    sampler = DigitsSampler(steps=2, guidance_scale=scale, batch=4)
    differ = not torch.equal(sampler(RecordingDenoiser(0.0), seed=0), sampler(RecordingDenoiser(1.0), seed=0))
    assert differ == changes


def test_frechet_distance_of_a_set_with_itself_is_zero_even_when_its_covariance_is_singular() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    features[:, 5] = features[:, 4]
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(features, features + 2) == pytest.approx(6 * 2**2)


def test_frechet_distance_of_scaled_features_is_that_of_the_gaussians() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    features -= features.mean(0)
    assert frechet_distance(features, 3 * features) == pytest.approx((3 - 1) ** 2 * float(features.var(0).sum()))


def test_checkpoint_is_trained_once_and_then_read(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "digits.safetensors"
    model = digits.load_or_train_digits_dit(path, seed=5, steps=1, progress=False)
    written = path.read_bytes()
    again = digits.load_or_train_digits_dit(path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert path.read_bytes() == written
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_training_reports_each_step() -> None:
    reports: list[tuple[Any, ...]] = []
    digits.train_digits_dit(digits.build_digits_dit(), steps=2, on_progress=lambda *report: reports.append(report))
    assert reports == [("training", 1, 2), ("training", 2, 2)]


@pytest.mark.parametrize("progress", [True, False])
def test_training_for_want_of_a_checkpoint_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    path = tmp_path / "digits.safetensors"
    digits.load_or_train_digits_dit(path, steps=1, progress=progress)
    assert (f"no checkpoint at {path}: training the digits model" in capsys.readouterr().err) == progress


def test_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError, match=r"cannot read .*digits\.safetensors") as error:
        digits.load_or_train_digits_dit(path)
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_model_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    model = digits.build_digits_classifier()
    model.head = torch.nn.Linear(32, 7)
    save_checkpoint(model, path, seed=0, steps=0)
    message = r"2 tensors differ, first 'head\.bias': saw \[7\], expected \[10\]"
    with pytest.raises(ArtifactError, match=message):
        digits.load_or_train_digits_classifier(path)


def test_committed_classifier_reads_the_held_out_scans() -> None:
    images, labels = digits.load_digits_tensor()
    classifier = digits.load_or_train_digits_classifier(CHECKPOINTS / "digits_classifier.safetensors")
    assert classifier.features(images[:3]).shape == (3, 32)
    assert classifier.accuracy(images[digits.HELD_OUT], labels[digits.HELD_OUT]) > 0.97


def test_committed_model_draws_the_digits_it_is_asked_for() -> None:
    model = digits.load_or_train_digits_dit(CHECKPOINTS / "digits_dit.safetensors")
    classifier = digits.load_or_train_digits_classifier(CHECKPOINTS / "digits_classifier.safetensors")
    sampler = DigitsSampler(steps=10)
    assert classifier.accuracy(sampler(model, seed=0), sampler.labels()) > 0.95


@pytest.mark.parametrize("name", ["digits_dit", "digits_classifier"])
def test_committed_checkpoint_is_small_and_says_how_it_was_trained(name: str) -> None:
    path = CHECKPOINTS / f"{name}.safetensors"
    assert path.stat().st_size <= 8e6
    assert json.loads(load_tensors(path)[1]["training"]).keys() == {"seed", "steps", "torch"}
