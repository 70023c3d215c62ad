"""The emoji example: captions, sampling, the judge, and a training that goes on where it stopped."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lazy_compile.bench.quality import scores
from lazy_compile.bench.tasks import emoji, emoji_data, emoji_judge
from lazy_compile.bench.tasks.emoji_training import EmojiTrainer, Pictures, Stage, epochs_of, orthogonal
from lazy_compile.bench.tasks.registry import SUBJECTS, emoji_subject
from lazy_compile.compiler import transform
from lazy_compile.errors import ArtifactError
from lazy_compile.ir.branch import BranchKind

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "emoji"
PICTURES = 6
STAGES = (Stage(16, 4, 2.0), Stage(32, 2, 3.0))


@pytest.fixture(scope="module")
def captions() -> emoji.Captions:
    return emoji.Captions.load(CHECKPOINTS / "emoji_captions.safetensors")


@pytest.fixture(scope="module")
def untrained() -> Any:
    return emoji.build_emoji_pixart()


@pytest.fixture(scope="module")
def pictures(captions: emoji.Captions) -> Pictures:
    images = torch.randint(256, (PICTURES, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Pictures.of(captions.texts[:PICTURES], images, captions)


def trainer(pictures: Pictures) -> EmojiTrainer:
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=64, patch_size=4, in_channels=3, out_channels=3, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, caption_channels=emoji.CAPTION_CHANNELS,
    )  # fmt: skip
    return EmojiTrainer(model, pictures, stages=STAGES)


def state_of(trained: EmojiTrainer) -> list[Tensor]:
    return [*trained.model.state_dict().values(), *trained.average.shadow_params]


def test_the_caption_file_holds_sorted_captions_and_the_empty_one(captions: emoji.Captions) -> None:
    assert captions.texts[-1] == ""
    assert list(captions.texts[:-1]) == sorted(set(captions.texts[:-1]))
    assert captions.states.shape == (len(captions.texts), emoji.TOKENS, emoji.CAPTION_CHANNELS)
    assert captions.states.isfinite().all()
    assert not captions.states[~captions.mask].any()
    assert captions.mask[-1].sum() == 2  # the marks of its ends
    assert (CHECKPOINTS / "emoji_captions.safetensors").stat().st_size < 6e6


def test_captions_survive_being_written(captions: emoji.Captions, tmp_path: Path) -> None:
    few = emoji.Captions(captions.texts[:3], captions.states[:3], captions.mask[:3])
    few.save(tmp_path / "few.safetensors")
    again = emoji.Captions.load(tmp_path / "few.safetensors")
    assert again.texts == few.texts
    assert torch.equal(again.states, few.states)
    assert torch.equal(again.mask, few.mask)


def test_captions_that_do_not_belong_together_are_refused(captions: emoji.Captions, tmp_path: Path) -> None:
    emoji.Captions(captions.texts[:2], captions.states[:3], captions.mask[:3]).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ArtifactError, match="2 captions, 3 lengths"):
        emoji.Captions.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    ("characters", "kept"),
    [
        ("\U0001f98a", True),  # fox
        ("\u2764\ufe0f\u200d\U0001f525", True),  # heart on fire
        ("\U0001f468", True),  # man
        ("\U0001f44b\U0001f3fd", False),  # waving hand, a skin tone
        ("\U0001f1e9\U0001f1ea", False),  # flag written by letters
        ("\U0001f468\u200d\U0001f692", False),  # man firefighter
        ("\U0001f3c3\u200d\u2640\ufe0f", False),  # woman running
        ("\U0001f6b6\u200d\u27a1\ufe0f", False),  # person walking facing right
    ],
)
def test_variants_of_another_emoji_are_left_out(characters: str, kept: bool) -> None:
    assert emoji_data.chosen(characters) == kept


@pytest.mark.skipif(
    not emoji_data.FONT.exists() or importlib.util.find_spec("emoji") is None, reason="needs the font and the names"
)
def test_pictures_are_drawn_for_the_known_captions(captions: emoji.Captions) -> None:
    texts, images = emoji_data.draw(size=8)
    assert images.shape == (len(texts), 3, 8, 8)
    assert len(set(texts) & set(captions.texts)) > 0.95 * len(captions.texts)


def test_an_untrained_model_predicts_zero(captions: emoji.Captions, untrained: Any) -> None:
    call = emoji.example_inputs(captions, 1) | {"hidden_states": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        assert not untrained(**call)[0].any()


def test_the_sampler_follows_a_straight_flow_exactly(captions: emoji.Captions) -> None:
    target = torch.randn(2, 3, 64, 64)

    def denoiser(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return ((hidden_states - target.repeat(2, 1, 1, 1)) / (timestep / 1000)[:, None, None, None],)

    for steps in (2, 7):
        samples = emoji.EmojiSampler(captions, steps=steps, batch=2)(denoiser, 0)
        torch.testing.assert_close(samples, target, rtol=0, atol=1e-4)


def test_every_caption_comes_up_once_before_one_comes_again(captions: emoji.Captions) -> None:
    count = len(captions.texts) - 1
    assert sorted(emoji.EmojiSampler(captions).rows(count).tolist()) == list(range(count))


def test_muon_steps_in_every_direction_alike() -> None:
    for shape in ((2, 24, 24), (3, 8, 32), (1, 32, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert float(values.max()) < 1.3
        assert float(values.median()) > 0.6


def test_an_epoch_holds_every_picture_once() -> None:
    rows = torch.cat([epochs_of(start, 4, PICTURES, seed=0) for start in range(0, 3 * PICTURES, 4)])
    for epoch in rows[: 3 * PICTURES].view(3, PICTURES).tolist():
        assert sorted(epoch) == list(range(PICTURES))


def test_training_stopped_and_resumed_is_the_same_training(pictures: Pictures, tmp_path: Path) -> None:
    whole, first, second = trainer(pictures), trainer(pictures), trainer(pictures)
    losses: list[float] = []
    whole.run(losses.append)
    assert [whole.step, whole.images_seen] == [6, 18]  # three batches of four, then three of two
    for _ in range(2):
        first.train_step(STAGES[0])
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    resumed: list[float] = []
    second.run(resumed.append)
    assert resumed == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(second), strict=True))


def test_training_goes_on_from_exported_weights(pictures: Pictures, tmp_path: Path) -> None:
    first, second = trainer(pictures), trainer(pictures)
    first.run(lambda loss: None)
    first.export(tmp_path / "weights.safetensors")
    second.resume(tmp_path / "weights.safetensors")
    assert [second.step, second.images_seen] == [first.step, first.images_seen]
    for average, parameter in zip(first.average.shadow_params, second.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), average.half().float(), rtol=0, atol=0)


def test_the_judge_finds_captions_by_similarity_and_compares_activations() -> None:
    judge, images = emoji_judge.build_emoji_judge(), torch.randn(4, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        embeddings = judge(images)
    rows = torch.arange(4)
    assert judge.found(images, embeddings, rows) == 1
    assert judge.found(images, embeddings, rows.flip(0)) == 0
    assert judge.found(images, embeddings, rows.flip(0), among=4) == 1
    assert judge.perceptual_distance(images, images) == 0
    assert judge.perceptual_distance(images, images.flip(0)) > judge.perceptual_distance(images, 0.9 * images)


def test_training_the_judge_helps(captions: emoji.Captions) -> None:
    colours = torch.tensor([[i // 4, i // 2 % 2, i % 2] for i in range(8)]).float() * 2 - 1
    judge, images = emoji_judge.build_emoji_judge(), colours[:, :, None, None].repeat(1, 1, 64, 64)
    embeddings = emoji_judge.sentence_embeddings(captions.states[:9], captions.mask[:9])
    emoji_judge.train_emoji_judge(judge, images, embeddings, steps=30, batch=8)
    assert judge.found(images, embeddings, torch.arange(8)) > 0.5


def test_it_is_captured_with_three_branches_a_block_and_exact(captions: emoji.Captions, untrained: Any) -> None:
    model, call = copy.deepcopy(untrained), emoji.example_inputs(captions, 1)
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.1)
        for block in model.transformer_blocks:
            for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
                layer.weight.normal_(std=0.1)
        call["hidden_states"].normal_()
        lazy = transform(model, call)
        assert [branch.kind for branch in lazy.branches] == [
            BranchKind.SELF_ATTENTION, BranchKind.CROSS_ATTENTION, BranchKind.MLP,
        ] * 8  # fmt: skip
        assert torch.equal(lazy(**call)[0], model(**call)[0])


def test_it_is_registered() -> None:
    assert SUBJECTS["emoji"] is emoji_subject
    assert list(SUBJECTS) == ["digits", "scenes", "emoji"]


def test_without_trained_weights_it_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a checkout has it in examples/emoji.*train it with examples/emoji/train"):
        emoji.load_emoji_pixart(tmp_path / "emoji_pixart.safetensors")


def test_the_committed_weights_are_small_and_belong_to_the_model(captions: emoji.Captions) -> None:
    path = CHECKPOINTS / "emoji_pixart.safetensors"
    assert path.stat().st_size <= 40e6
    model = emoji.load_emoji_pixart(path)
    with torch.no_grad():
        velocity = model(**emoji.example_inputs(captions, 1) | {"hidden_states": torch.zeros(2, 3, 16, 16)})[0]
    assert velocity.abs().max() > 0.1


def test_the_judge_knows_what_the_pictures_are_compared_by(captions: emoji.Captions) -> None:
    subject = emoji_subject(batch=1)
    pictures = subject.sampler(1, 2)(lambda images, **_: (images,), 0)  # type: ignore[arg-type]
    scored = scores(subject, pictures, pictures, pictures)
    assert scored.keys() >= {"rmse_dense", "psnr", "ssim", "frechet", "perceptual", "accuracy", "among_five"}
    assert scored["frechet"] == pytest.approx(0, abs=1e-6)


def test_the_committed_judge_is_small() -> None:
    assert (CHECKPOINTS / "emoji_judge.safetensors").stat().st_size <= 2e6
