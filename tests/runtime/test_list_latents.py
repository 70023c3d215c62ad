"""Models whose latents lie on no axis of rows, or are no floating-point numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from support.layers import WIDTH
from support.small_model import Wraps
from support.toy_models import randomize

STEPS = 8
TOKENS = (6, 9)


class Listed(Wraps):
    """One attention over the tokens of all images, as in ZImage."""

    def forward(self, x: list[Tensor], t: Tensor) -> list[Tensor]:
        first = x[0].shape[0]
        (out,) = self.small(torch.cat(x)[None], t)
        return [out[:first], out[first:]]


class Packed(Wraps):
    """The same with one tensor of all tokens."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (out,) = self.small(x[None], t)
        return out


Images = list[Tensor]


class Host:
    """Calls a model with two images, in its form."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.lazy: LazyModule = lazy_compile.transform(self.model, self._given(noise(0), 0))
        table = torch.arange(STEPS)[:, None].expand(-1, 2) % 2 == 0
        self.lazy.policy = Scheduled(CacheSchedule(table.numpy()))

    def _given(self, images: Images, step: int) -> dict[str, object]:
        x = images if isinstance(self.model, Listed) else torch.cat(images)
        return {"x": list(x) if isinstance(x, list) else x, "t": torch.tensor([1000.0 - 100 * step])}

    @torch.no_grad()
    def predict(self, model: Callable[..., object], images: Images, step: int) -> Images:
        result = model(**self._given(images, step))
        return result if isinstance(result, list) else list(result.split(TOKENS))  # type: ignore[attr-defined]

    def step(self, model: Callable[..., object], images: Images, step: int) -> Images:
        return [x - 0.1 * each for x, each in zip(images, self.predict(model, images, step), strict=True)]


def noise(seed: int) -> Images:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, WIDTH, generator=draw) for tokens in TOKENS]


@pytest.fixture(scope="module", params=[Listed, Packed])
def host(request: pytest.FixtureRequest) -> Host:
    return Host(randomize(request.param()))


def test_a_trajectory_is_followed(host: Host) -> None:
    host.lazy.reset()
    host.lazy.reset_stats()
    images = noise(1)
    for step in range(STEPS):
        images = host.step(host.lazy, images, step)
    assert host.lazy.stats.lazy_ratio == 0.5


def test_requests_do_not_mix(host: Host) -> None:
    def alone(seed: int) -> Images:
        host.lazy.reset()
        images = noise(seed)
        for step in range(STEPS):
            images = host.step(host.lazy, images, step)
        return images

    expected = [alone(2), alone(3)]
    host.lazy.reset()
    seen = [noise(2), noise(3)]
    for step in range(STEPS):
        seen = [host.step(host.lazy, images, step) for images in seen]
    assert all(torch.equal(a, b) for pair in zip(seen, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("replaced", [0, 1])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_image_that_is_replaced_by_another_is_computed(host: Host, replaced: int, at: int) -> None:
    host.lazy.reset()
    images, others = noise(4), noise(5)
    for step in range(at):
        images = host.step(host.lazy, images, step)
        others = host.step(host.model, others, step)
    images[replaced] = others[replaced]
    expected = host.predict(host.model, images, at)
    assert all(map(torch.equal, host.predict(host.lazy, images, at), expected))


class Tokens(Wraps):
    """Masked diffusion of text: what moves are whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, ids: Tensor, t: Tensor) -> Tensor:
        return self.head(self.small(self.embed(ids), t))


def test_tokens_that_move_cannot_be_followed_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = randomize(Tokens()).eval(), torch.full((2, 12), 19)
    lazy = lazy_compile.transform(model, {"ids": ids, "t": torch.full((2,), 1000.0)})
    lazy.policy = Scheduled(CacheSchedule.every(2, 12, 2))
    for step in range(12):
        given = {"ids": ids, "t": torch.full((2,), 1000.0 - 80 * step)}
        with torch.no_grad():
            logits = lazy(**given)
            assert torch.equal(logits, model(**given))
        ids = ids.clone()
        ids[:, step] = logits[:, step].argmax(-1) % 19
    (told,) = [record.getMessage() for record in caplog.records if "do not continue one another" in record.getMessage()]
    assert "lazy.trajectory(key, step=i)" in told
    with torch.no_grad():
        for step in range(4):
            with lazy.trajectory("a", step=step):
                lazy(ids=ids, t=torch.full((2,), 1000.0 - 80 * step))
    assert lazy.stats.lazy_ratio > 0
