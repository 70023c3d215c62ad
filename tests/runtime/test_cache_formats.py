"""Caches in fewer bits, elsewhere, within a budget, and only where something may reuse them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, LazyConfig, LazyModule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import BranchKind, BranchTensor, ResidualBranch
from lazy_compile.runtime.cache_format import CacheFormat
from support.toy_models import TOYS, call, trajectory

Compiled = Callable[..., LazyModule]

STEPS = 8


def branch(batch_axis: int | None = 0) -> ResidualBranch:
    output = BranchTensor("y", (3, 4, 8), "float32", batch_axis, -1, 3 * 4 * 8 * 4)
    return ResidualBranch(0, "b", BranchKind.MLP, "", 1, (output,), (output,), row_separable=True)


@pytest.mark.parametrize("batch_axis", [0, 1, None])
@pytest.mark.parametrize(
    ("dtype", "error", "share"),
    [(None, 0.0, 1.0), (torch.bfloat16, 2**-8, 0.5), (torch.float8_e4m3fn, 2**-3, 0.25)],
)
def test_what_is_stored_is_loaded_again_but_for_rounding(
    dtype: torch.dtype | None, error: float, share: float, batch_axis: int | None
) -> None:
    form, one = CacheFormat(dtype), branch(batch_axis)
    value = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    value *= torch.tensor([1e-3, 1.0, 1e5])[:, None, None] if batch_axis == 0 else 1.0  # each row has a scale
    (seen,) = form.load(form.store([value], one), one, value.device)
    assert seen.dtype == value.dtype
    largest = value.abs().amax(dim=(1, 2), keepdim=True)
    assert ((seen - value).abs() <= error * largest).all()
    assert form.bytes(one) == share * value.numel() * 4


def test_rows_of_zeros_have_a_scale() -> None:
    form, one = CacheFormat(torch.float8_e4m3fn), branch()
    (seen,) = form.load(form.store([torch.zeros(3, 4, 8)], one), one, torch.device("cpu"))
    assert torch.equal(seen, torch.zeros(3, 4, 8))


def run(lazy: LazyModule, rows: slice = slice(None)) -> list[torch.Tensor]:
    calls = trajectory(TOYS["mmdit"], 4, steps=STEPS)
    with torch.no_grad():
        return [lazy(**{name: value[rows] for name, value in one.items()}) for one in calls]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_caches_of_fewer_bits_change_little_and_rows_stay_apart(compiled: Compiled, dtype: str) -> None:
    table = CacheSchedule.random(0.5, STEPS, 2, seed=1)
    outputs = []
    for cache_dtype in (None, dtype):
        lazy = compiled("mmdit", granularity="block", cache_dtype=cache_dtype)
        lazy.policy = Scheduled(table)
        outputs.append(run(lazy))
    for step, (full, small) in enumerate(zip(*outputs, strict=True)):
        difference = float((full - small).abs().max() / full.abs().max())
        assert difference <= (0.2 if dtype == "float8_e4m3fn" else 0.02), step
        assert (difference == 0) == bool(table.should_compute[step].all())
    alone = run(lazy, slice(1, 2))
    for together, one in zip(outputs[1], alone, strict=True):
        limit = 2e-3 if dtype == "bfloat16" else 2e-2  # what lies between two numbers may be rounded to either
        assert (together[1:2] - one).abs().max() <= limit * one.abs().max()


def test_nothing_is_cached_that_no_step_reuses(compiled: Compiled) -> None:
    lazy = compiled("dit", reuse="last", hoist_step_invariants=False)
    calls = trajectory(TOYS["dit"], 2, steps=STEPS)
    lazy.policy = AlwaysCompute()
    with torch.no_grad():
        lazy(**calls[0])
        assert lazy.cache_bytes == 0
        table = np.ones((STEPS, 4), dtype=bool)
        table[3, 1] = table[5, 2] = False
        lazy.policy = Scheduled(CacheSchedule(table))
        seen = []
        for arguments in calls:
            lazy(**arguments)
            seen.append(lazy.cache_bytes)
    one = lazy.branches[0].output_bytes
    assert seen == [2 * one, 2 * one, 2 * one, one, one, 0, 0, 0]
    assert lazy.stats.reused.sum() == 4


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (1.0, {}),
        (0.5, {"cache_dtype": "bfloat16"}),
        (0.25, {"cache_dtype": "bfloat16", "granularity": "block"}),
        (0.125, {"cache_dtype": "bfloat16", "granularity": "model"}),
        (0.0625, {"cache_dtype": "bfloat16", "granularity": "model", "reuse": "last"}),
    ],
)
def test_a_budget_picks_what_fits(
    compiled: Compiled, caplog: pytest.LogCaptureFixture, budget: float, chosen: dict[str, str]
) -> None:
    whole = compiled("dit").expected_cache_bytes
    most = int(budget * whole)
    lazy = compiled("dit", max_cache_bytes=most)
    lazy.capture(**call(TOYS["dit"]))
    assert {name: getattr(lazy.lazy_config, name) for name in chosen} == chosen
    assert lazy.expected_cache_bytes <= most
    assert bool(chosen) == ("to keep to max_cache_bytes" in caplog.text)
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    lazy.lazy_config = lazy_compile.LazyConfig(**{**chosen, "max_cache_bytes": most, "hoist_step_invariants": False})
    with torch.no_grad():
        for arguments in trajectory(TOYS["dit"], steps=4):
            lazy(**arguments)
            assert 0 < lazy.cache_bytes <= most
    assert lazy.stats.lazy_ratio == 0.5


def test_a_budget_that_cannot_be_met_is_refused(compiled: Compiled) -> None:
    lazy = compiled("dit", max_cache_bytes=100)
    with pytest.raises(ConfigError, match=r"take 0\.00\d+ MiB at least, and max_cache_bytes is"):
        lazy.capture(**call(TOYS["dit"]))


def test_a_larger_call_caches_what_finds_room(compiled: Compiled, caplog: pytest.LogCaptureFixture) -> None:
    lazy = compiled("dit", reuse="last", hoist_step_invariants=False)
    most = lazy.expected_cache_bytes
    lazy = compiled("dit", reuse="last", hoist_step_invariants=False, max_cache_bytes=most)
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 4))
    with torch.no_grad():
        for arguments in trajectory(TOYS["dit"], 4, steps=2):
            lazy(**arguments)
            assert lazy.cache_bytes <= most
    assert "are not cached and compute, since max_cache_bytes are taken" in caplog.text
    assert lazy.stats.reuse_table[1].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("option", "value"), [("cache_dtype", "int8"), ("max_cache_bytes", 0)])
def test_unknown_formats_are_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        LazyConfig(**{option: value})
