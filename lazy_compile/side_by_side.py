"""Dense against lazy on one's own model: seconds, error, compute, memory, and pictures of both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazy_compile.errors import ConfigError, import_optional
from lazy_compile.integrations.diffusers_pipeline import is_pipeline, lazy_denoisers
from lazy_compile.integrations.pipeline_sampling import Loss, pipeline_samplers
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import atomic_path


@dataclass(frozen=True)
class SideBySide:
    """The same noise sampled twice.

    Attributes:
        dense, lazy: ``float[B, ...]``, the samples; decoded images in [0, 1] of a pipeline that can.
        dense_seconds, seconds: of each; decoding included.
        compute_ratio: MACs spent over those of the dense model; of a pipeline, of its lazy models together.
        lazy_ratio: reused over all branch evaluations.
        cache_bytes: what all caches of the lazy models take at the captured sizes.
        peak_bytes: largest memory on the device while dense and lazy samples were drawn; 0 on a CPU.
    """

    dense: Tensor
    lazy: Tensor
    dense_seconds: float
    seconds: float
    compute_ratio: float
    lazy_ratio: float
    cache_bytes: int
    peak_bytes: tuple[int, int]

    @property
    def errors(self) -> Tensor:
        """``float64[B]``: root mean square difference of each sample."""
        return (self.lazy - self.dense).double().square().flatten(1).mean(1).sqrt()

    @property
    def rmse(self) -> float:
        return float(self.errors.square().mean().sqrt())

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        span = float(self.dense.max() - self.dense.min())
        psnr = 20 * math.log10(span / self.rmse) if self.rmse > 0 and span > 0 else None
        return {
            "dense_seconds": self.dense_seconds, "seconds": self.seconds, "speedup": self.speedup,
            "compute_ratio": self.compute_ratio, "lazy_ratio": self.lazy_ratio, "rmse": self.rmse,
            "median_rmse": float(self.errors.median()), "worst_rmse": float(self.errors.max()), "psnr": psnr,
            "cache_bytes": self.cache_bytes, "dense_peak_bytes": self.peak_bytes[0], "peak_bytes": self.peak_bytes[1],
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.seconds:.3g} s instead of {self.dense_seconds:.3g} s ({self.speedup:.2f}x), "
            f"{self.compute_ratio:.0%} of the MACs, RMSE {self.rmse:.3g} (median {float(self.errors.median()):.3g}), "
            f"caches of {self.cache_bytes / 1e6:.3g} MB"
        )

    def save(self, path: str | Path) -> None:
        """One picture: dense samples above, lazy ones below; of videos their first frames.

        Raises:
            ConfigError: the samples are no images, such as latents of more than four channels.
        """
        image = import_optional("PIL.Image", "diffusers")
        rows = [torch.cat(list(_images(samples)), dim=2) for samples in (self.dense, self.lazy)]
        pixels = torch.cat(rows, dim=1)
        low, high = (0.0, 1.0) if float(self.dense.min()) >= 0 and float(self.dense.max()) <= 1 else (-1.0, 1.0)
        values = (
            ((pixels.float() - low) / (high - low)).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        )
        with atomic_path(Path(path)) as temporary:
            image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values).save(temporary, format="PNG")


def compare(
    target: Any,
    sample: Callable[[Any, int], Tensor] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    loss: Loss = "decoded",
    seed: int = 0,
    **call: Any,
) -> SideBySide:
    """Sample the same noise with the original and with the lazy model, under its policy.

    ``compare(lazy, sample)`` for a model and its sampler, ``compare(pipe, prompts=[...], num_inference_steps=28)`` for
    a pipeline whose denoisers are lazy.

    Args:
        target: a lazy model or pipeline; as before afterwards, but for statistics and caches.
        sample: ``(denoiser, seed) -> samples``, for a model.
        prompts: of a pipeline.
        loss: what of a pipeline's samples is compared, see :func:`lazy_compile.plan`; ``"latent"`` leaves the decoder
            out of the seconds.
        seed: of the noise.
        call: other arguments of the pipeline's call.

    Raises:
        ConfigError: nothing is lazy, or there is nothing to sample with.
    """
    if is_pipeline(target):
        if sample is not None:
            raise ConfigError("a pipeline samples by its own call; leave the sampler out, or compare its model")
        denoisers = lazy_denoisers(target)
        (sampler,) = pipeline_samplers(target, call, prompts, loss, None, 1)
    else:
        if sample is None or call or prompts is not None:
            raise ConfigError(
                "a model is compared with a sampler: compare(lazy, sample); other options are a pipeline's"
            )
        denoisers, sampler = {"": target}, sample  # type: ignore[assignment]
    if not denoisers or not all(isinstance(each, LazyModule) for each in denoisers.values()):
        raise ConfigError("nothing here is lazy; compare() takes what transform() returned")
    lazies = list(denoisers.values())
    with torch.no_grad():
        sampler(target, seed)  # captures, and prepares kernels
        for each in lazies:
            each.reset()
            each.reset_stats()
        samples, seconds, peak = _timed(sampler, target, seed)
        statistics = [each.stats for each in lazies if each.is_captured and each.stats.calls]
        cached = sum(each.expected_cache_bytes for each in lazies)
        with _originals(target, denoisers) as original:
            dense, dense_seconds, dense_peak = _timed(sampler, original, seed)
    spent = [stats.calls * stats.total_macs for stats in statistics]
    ratio = sum(stats.compute_ratio * macs for stats, macs in zip(statistics, spent, strict=True)) / max(sum(spent), 1)
    asked = sum(float(stats.evaluated.sum()) for stats in statistics)
    reused = sum(float(stats.reused.sum()) for stats in statistics)
    return SideBySide(
        dense, samples, dense_seconds, seconds, ratio, reused / max(asked, 1.0), cached, (dense_peak, peak)
    )


@contextmanager
def _originals(target: Any, denoisers: Mapping[str, LazyModule]) -> Iterator[Any]:
    """What to sample with in the place of lazy models."""
    if not is_pipeline(target):
        yield target.original
        return
    for name, lazy in denoisers.items():
        setattr(target, name, lazy.original)
    try:
        yield target
    finally:
        for name, lazy in denoisers.items():
            setattr(target, name, lazy)


def _timed(sampler: Callable[[Any, int], Tensor], target: Any, seed: int) -> tuple[Tensor, float, int]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    samples = sampler(target, seed).clone()
    if on_gpu:
        torch.cuda.synchronize()
    return samples, time.perf_counter() - begun, torch.cuda.max_memory_allocated() if on_gpu else 0


def _images(samples: Tensor) -> Tensor:
    """``float[B, C, H, W]``."""
    images = samples
    if samples.dim() == 5:  # videos have their frames before the channels if decoded, and behind them if not
        images = samples[:, 0] if samples.shape[2] in (1, 3, 4) else samples[:, :, 0]
    if images.dim() != 4 or images.shape[1] not in (1, 3, 4):
        raise ConfigError(
            f"samples of shape {list(samples.shape)} are no pictures; of a pipeline compare decoded ones "
            '(loss="decoded")'
        )
    return images
