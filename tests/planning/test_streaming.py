"""Memory that is spared on the way through a trajectory and back changes nothing of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lazy_compile import CacheSchedule, LazyModule
from lazy_compile.errors import ConfigError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.planning.estimate import estimate_plan, parse_bytes
from lazy_compile.planning.output_store import OutputStore, Streaming
from lazy_compile.planning.sample_response import Response, measure_response
from lazy_compile.planning.trace import Trace
from support.sampling import STEPS, inputs, lazy_tiny_dit, sample, start, timesteps

SCHEDULE = CacheSchedule.every(2, STEPS, 4)


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_tiny_dit()


@pytest.fixture(scope="module")
def expected(lazy: LazyModule) -> Response:
    return measure_response(lazy, sample, SCHEDULE, seed=0, directions=2)


@pytest.mark.parametrize("repeat_branches", [False, True])
@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_wherever_outputs_are_kept_the_response_is_the_same(
    lazy: LazyModule, expected: Response, keep: Any, repeat_branches: bool
) -> None:
    seen = measure_response(
        lazy, sample, SCHEDULE, seed=0, directions=2, streaming=Streaming(keep, repeat_branches=repeat_branches)
    )
    assert np.array_equal(seen.directional_derivatives, expected.directional_derivatives)
    assert np.array_equal(seen.error, expected.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_a_store_gives_back_what_it_was_given(keep: Any, dtype: torch.dtype) -> None:
    store = OutputStore(Streaming(keep))
    given = [torch.arange(seed, seed + 24.0).reshape(2, 3, 4).to(dtype) for seed in range(3)]
    numbers = [store.put(tensor.transpose(0, 1)) for tensor in given]
    for number, tensor in zip(reversed(numbers), reversed(given), strict=True):
        back = store.get(number)
        assert back.dtype == dtype
        assert torch.equal(back.float(), tensor.transpose(0, 1).float())
    store.close()


def test_in_a_file_no_outputs_stay_in_memory(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    put = OutputStore.put

    def noted(store: OutputStore, tensor: Tensor) -> int:
        number = put(store, tensor)
        kept.append(store._held[number])
        return number

    monkeypatch.setattr(OutputStore, "put", noted)
    measure_response(lazy, sample, SCHEDULE, seed=0, streaming=Streaming("disk"))
    assert len(kept) == 4 * STEPS
    assert not any(isinstance(each, Tensor) for each in kept)


def test_a_branch_that_is_repeated_saves_nothing_for_its_gradients(
    lazy: LazyModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = [0], LazyBranch.compute

    def counted(branch: LazyBranch, given: Sequence[Any]) -> tuple[Tensor, ...]:
        computed[0] += 1
        return compute(branch, given)

    monkeypatch.setattr(LazyBranch, "compute", counted)
    counts = []
    for repeat_branches in (False, True):
        computed[0] = 0
        streaming = Streaming(repeat_branches=repeat_branches)
        measure_response(lazy, sample, SCHEDULE, seed=0, rows_are_samples=True, streaming=streaming)
        counts.append(computed[0])
    assert counts[1] > counts[0]


def test_inputs_of_branches_that_are_repeated_do_not_wait_for_the_way_back(
    lazy: LazyModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[StorageWeakRef] = []
    waiting: list[int] = []
    compute, answer = LazyBranch.compute, Trace.answer

    def noted(branch: LazyBranch, values: Sequence[Any]) -> tuple[Tensor, ...]:
        if not waiting:
            activations = [value for value in values if value.requires_grad and not value.is_leaf]
            given.extend(StorageWeakRef(value.untyped_storage()) for value in activations)
        return compute(branch, values)

    def counted(trace: Trace, *arguments: Any, **options: Any) -> Tensor:
        waiting.append(sum(not each.expired() for each in given))
        return answer(trace, *arguments, **options)

    monkeypatch.setattr(LazyBranch, "compute", noted)
    monkeypatch.setattr(Trace, "answer", counted)
    streaming = Streaming("disk", repeat_branches=True)
    measure_response(lazy, sample, SCHEDULE, seed=0, rows_are_samples=True, streaming=streaming)
    assert len(given) > STEPS
    assert waiting[0] == 0


def rows_from(first: int, count: int) -> Any:
    """Rows of one large batch."""

    def sampler(denoiser: Any, seed: int) -> Tensor:
        x, given = start(seed, batch=8)[first : first + count], torch.arange(8)[first : first + count]
        with torch.no_grad():
            for timestep in timesteps():
                x = x - 0.1 * denoiser(**{**inputs(x, timestep), "y": given})
        return x

    return sampler


def test_several_samplers_measure_what_one_of_all_rows_does(lazy: LazyModule) -> None:
    whole = measure_response(lazy, rows_from(0, 8), SCHEDULE, seed=3, directions=2)
    parts = measure_response(lazy, [rows_from(0, 3), rows_from(3, 5)], SCHEDULE, seed=3, directions=2)
    assert parts.size == whole.size
    for name in ("directional_derivatives", "error", "weights", "timesteps", "sensitivity"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-5)


def test_a_limit_of_memory_chooses_how_it_is_spared_or_is_refused(lazy: LazyModule) -> None:
    free = estimate_plan(lazy, sample)
    assert free.streaming == Streaming("device")
    assert free.disk_bytes == 0
    less = estimate_plan(lazy, sample, max_memory=free.device_bytes - 1)
    assert less.streaming.keep == "disk"
    assert less.disk_bytes > 0
    assert less.device_bytes < free.device_bytes
    with pytest.raises(ConfigError, match=r"a plan takes at least .* GB of memory beside the model"):
        estimate_plan(lazy, sample, max_memory=1000)


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4e9), ("512 MiB", 2**29), ("1.5gib", 1.5 * 2**30), ("1000", 1000), ("7 b", 7)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 parsecs", "x4GB", "-4GB", "inf", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no size of memory"):
        parse_bytes(text)
