"""Models that move two things at once, such as a video and its sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled, export_onnx
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from support.layers import WIDTH
from support.small_model import Wraps
from support.toy_models import randomize

STEPS = 8
FRAMES, SOUND, WORDS = 7, 5, 3
GUIDANCE = {"video": 3.0, "sound": 1.5}

Pair = tuple[Tensor, Tensor]


class Joint(Wraps):
    """One attention over the tokens of video, sound and text. The time is given twice, as to LTX-2."""

    masked = False

    def forward(self, video: Tensor, sound: Tensor, text: Tensor, t: Tensor, sigma: Tensor) -> Pair:
        out = self.small(torch.cat([video, sound[..., :WIDTH] + 1e-3 * sigma[..., None], text], 1), t)
        return out[:, :FRAMES], out[:, FRAMES : FRAMES + SOUND]


class Masked(Joint):
    """The same, where a channel beside those of the sound says which of it is given."""

    masked = True

    def forward(self, video: Tensor, sound: Tensor, text: Tensor, t: Tensor, sigma: Tensor) -> Pair:
        return super().forward(video, sound * (1 - sound[..., WIDTH:]), text, t, sigma)


class Host:
    """Guided by two calls a step, with a scale of its own for video and sound."""

    def __init__(self, model: Joint, folder: Path | None) -> None:
        self.model = model.eval()
        given = self._given(noise(0, 0), 0, text(1))
        lazy, policy = lazy_compile.transform(self.model, given), Scheduled(CacheSchedule.every(2, STEPS, 2))
        self.lazy: LazyModule | EngineDenoiser = lazy
        if folder is not None:
            export_onnx(lazy, folder / "joint.onnx", given)
            self.lazy = EngineDenoiser(OnnxRunner(folder / "joint.onnx", threads=1))
        self.lazy.policy = policy

    def _given(self, latents: Pair, step: int, words: Tensor) -> dict[str, Tensor]:
        video, sound = latents
        if self.model.masked:
            sound = torch.cat([sound, torch.zeros_like(sound[..., :1])], -1)
        time = torch.full((len(video),), 1000.0 - 100 * step)
        return {"video": video, "sound": sound, "text": words, "t": time, "sigma": time[:, None].expand(-1, SOUND)}

    @torch.no_grad()
    def step(self, model: Callable[..., Pair], latents: Pair, step: int, prompt: int = 1) -> Pair:
        calls = [self._given(latents, step, text(seed)) for seed in (prompt, 0)]
        guided, plain = (model(**dict(reversed(given.items()))) for given in calls)  # in another order than exported
        scales = GUIDANCE["video"], GUIDANCE["sound"]
        moved = [low + scale * (high - low) for high, low, scale in zip(guided, plain, scales, strict=True)]
        return latents[0] - 0.05 * moved[0], latents[1] - 0.05 * moved[1]

    def sample(self, *requests: tuple[Pair, int]) -> list[Pair]:
        """Requests that take turns, each with its latents and its prompt."""
        self.lazy.reset()
        self.lazy.reset_stats()
        seen = [latents for latents, _ in requests]
        for step in range(STEPS):
            seen = [self.step(self.lazy, each, step, prompt) for each, (_, prompt) in zip(seen, requests, strict=True)]
        return seen


def noise(video: int, sound: int) -> Pair:
    draws = torch.Generator().manual_seed(video), torch.Generator().manual_seed(100 + sound)
    return torch.randn(1, FRAMES, WIDTH, generator=draws[0]), torch.randn(1, SOUND, WIDTH, generator=draws[1])


def text(seed: int) -> Tensor:
    return torch.randn(1, WORDS, WIDTH, generator=torch.Generator().manual_seed(200 + seed))


KINDS = {"joint": (Joint, False), "masked": (Masked, False), "exported": (Masked, True)}


@pytest.fixture(scope="module", params=KINDS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    kind, is_exported = KINDS[request.param]
    return Host(randomize(kind()), tmp_path_factory.mktemp("joint") if is_exported else None)


def test_a_trajectory_is_followed_from_its_second_step_on(host: Host) -> None:
    (latents,) = host.sample((noise(1, 1), 1))
    assert host.lazy.stats.lazy_ratio == 0.5
    dense = noise(1, 1)
    for step in range(STEPS):
        dense = host.step(host.model, dense, step)
    assert not torch.equal(latents[0], dense[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((noise(1, 1), 1), (noise(2, 2), 1)),
        ((noise(1, 1), 1), (noise(1, 2), 1)),
        ((noise(1, 1), 1), (noise(2, 1), 1)),
        ((noise(1, 1), 1), (noise(1, 1), 2)),
    ],
    ids=["other latents", "other sound", "other video", "other prompt"],
)
def test_requests_do_not_mix(host: Host, first: tuple[Pair, int], second: tuple[Pair, int]) -> None:
    expected = [*host.sample(first), *host.sample(second)]
    seen = host.sample(first, second)
    for one, other in zip(seen, expected, strict=True):
        assert all(map(torch.equal, one, other))
    assert host.lazy.stats.lazy_ratio == 0.5


def test_a_sound_that_is_replaced_on_the_way_is_computed(host: Host) -> None:
    latents, others = noise(3, 3), noise(4, 4)
    host.lazy.reset()
    for step in range(3):
        latents, others = host.step(host.lazy, latents, step), host.step(host.model, others, step)
    swapped = latents[0], others[1]
    expected = host.step(host.model, swapped, 3)
    for one, other in zip(host.step(host.lazy, swapped, 3), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_rows_of_a_batch_keep_their_own(host: Host) -> None:
    pairs = [noise(5, 5), noise(6, 6)]
    expected = [host.sample((pair, 1))[0] for pair in pairs]
    host.lazy.reset()
    both = [torch.cat(each) for each in zip(*pairs, strict=True)]
    latents: Pair = (both[0], both[1])
    host.lazy.reset_stats()
    for step in range(STEPS):
        given = [host._given(latents, step, text(seed).expand(2, -1, -1)) for seed in (1, 0)]
        with torch.no_grad():
            guided, plain = host.lazy(**given[0]), host.lazy(**given[1])
        moved = [low + s * (high - low) for high, low, s in zip(guided, plain, (3.0, 1.5), strict=True)]
        latents = latents[0] - 0.05 * moved[0], latents[1] - 0.05 * moved[1]
    assert host.lazy.stats.lazy_ratio == 0.5
    for row, pair in enumerate(expected):
        for one, other in zip(latents, pair, strict=True):
            torch.testing.assert_close(one[row : row + 1], other, rtol=0, atol=1e-4)
