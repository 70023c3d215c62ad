"""The scenes example: what it draws is fixed by its seed, and shows what its prompt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazy_compile.bench.tasks import scenes

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "scenes"


def draw(count: int, seed: int = 0) -> scenes.Scenes:
    return scenes.SceneSource().draw(count, torch.Generator().manual_seed(seed))


def test_a_seed_fixes_the_scenes() -> None:
    first, again, other = draw(8), draw(8), draw(8, seed=1)
    assert first.images.shape == (8, 3, 16, 16)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert float(first.images.min()) >= -1
    assert float(first.images.max()) <= 1


def test_a_scene_shows_its_colour_in_front_of_its_photograph() -> None:
    drawn = draw(200)
    for colour, value in enumerate(scenes.COLOURS.values()):
        mine = drawn.images[drawn.words[:, 1] == colour]
        near = (mine - torch.tensor(value)[None, :, None, None]).abs().amax(1) < 0.02
        assert (near.flatten(1).sum(1) >= 6).all()  # the smallest shape of these has 8
    assert (drawn.words.amax(0) == torch.tensor([3, 5, 1])).all()
    assert scenes.prompts(drawn.words).sum((1, 2)).eq(3).all()


def test_an_untrained_model_predicts_zero_and_training_changes_it() -> None:
    model = scenes.build_scenes_mmdit()
    words = draw(2).words
    prompt = scenes.prompts(words)
    call: dict[str, Any] = {"timestep": torch.full((2,), 500.0), "return_dict": False}
    with torch.no_grad():
        assert not model(torch.randn(2, 3, 16, 16), prompt, prompt.sum(1), **call)[0].any()
    scenes.train_scenes_mmdit(model, steps=2, batch=4)
    assert model.proj_out.weight.any()


def test_the_sampler_follows_a_straight_flow_exactly() -> None:
    target = draw(4).images

    def denoiser(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        sigma = (timestep / 1000)[:, None, None, None]
        return ((hidden_states - target.repeat(2, 1, 1, 1)) / sigma,)

    for steps in (2, 7):
        samples = scenes.ScenesSampler(steps=steps, batch=4)(denoiser, 0)
        torch.testing.assert_close(samples, target, rtol=0, atol=1e-4)


def test_rows_are_balanced_over_shapes_and_colours() -> None:
    words = scenes.ScenesSampler().words(48)
    assert len({tuple(row) for row in words.tolist()}) == 48
    assert torch.bincount(scenes.classes_of(words)).tolist() == [2] * scenes.CLASSES


def test_the_trained_model_draws_what_is_asked_for() -> None:
    model = scenes.load_or_train_scenes_mmdit(CHECKPOINTS / "scenes_mmdit.safetensors")
    judge = scenes.load_or_train_scenes_classifier(CHECKPOINTS / "scenes_classifier.safetensors")
    sampler = scenes.ScenesSampler(steps=8, batch=24)
    assert judge.accuracy(sampler(model, 0), scenes.classes_of(sampler.words())) > 0.5
