"""Dense against lazy on one model, and what things say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import ConfigError
from support.sampling import STEPS, lazy_tiny_dit, sample


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_tiny_dit()


def test_both_are_sampled_from_the_same_noise(lazy: LazyModule, tmp_path: Path) -> None:
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 4))
    seen = lazy_compile.compare(lazy, sample, seed=3)
    assert torch.equal(seen.dense, sample(lazy.original, 3))
    assert torch.equal(seen.lazy, sample(lazy, 3))
    assert seen.lazy_ratio == 0.5
    assert seen.compute_ratio == pytest.approx(lazy.stats.compute_ratio)
    assert seen.rmse == pytest.approx(float((seen.lazy - seen.dense).double().square().mean().sqrt()))
    assert seen.cache_bytes > 0
    assert set(seen.to_dict()) >= {"seconds", "dense_seconds", "rmse", "psnr", "compute_ratio"}
    assert "of the MACs" in str(seen)
    seen.save(tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_what_computes_everything_has_no_error(lazy: LazyModule) -> None:
    lazy.policy = lazy_compile.AlwaysCompute()
    seen = lazy_compile.compare(lazy, sample)
    assert (seen.rmse, seen.compute_ratio, seen.to_dict()["psnr"]) == (0.0, 1.0, None)


def test_what_cannot_be_compared_is_refused(lazy: LazyModule) -> None:
    with pytest.raises(ConfigError, match="compared with a sampler"):
        lazy_compile.compare(lazy)
    with pytest.raises(ConfigError, match="nothing here is lazy"):
        lazy_compile.compare(lazy.original, sample)


def test_summaries_say_what_is_decided_and_what_was_saved(lazy: LazyModule) -> None:
    schedule = CacheSchedule.every(2, STEPS, 4)
    lazy.policy = Scheduled(schedule)
    assert "not called since" in lazy_compile.summary(lazy)
    sample(lazy, 0)
    text = lazy_compile.summary(lazy)
    assert "lazy TinyDiT: 4 branches" in text
    assert "reused 50% of the branch evaluations" in text
    assert lazy_compile.summary(schedule).startswith("6 steps of 4 branches; 50% reused")
    assert lazy_compile.summary(lazy.policy) == lazy.policy.describe()
    with pytest.raises(ConfigError, match=r"summary\(\) takes"):
        lazy_compile.summary(3)
