"""Which calls of a lazy model need a graph of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import ConfigError
from support.layers import WIDTH, norm
from support.small_model import NEVER, SMALL, STEPS, Decides, Small, Wraps, fresh, reused, run, same
from support.toy_models import TOLERANCE, TOYS, call, randomize, trajectory

Compiled = Callable[..., LazyModule]


def test_nothing_is_captured_before_the_first_call() -> None:
    lazy = lazy_compile.transform(SMALL.model())
    with pytest.raises(ConfigError) as caught:
        _ = lazy.branches
    assert str(caught.value) == "this model was not captured yet; call it once, or pass example_inputs to transform()"
    run(lazy, [call(SMALL)])
    assert [branch.name for branch in lazy.branches] == [name for name, _ in SMALL.branches]


@pytest.mark.parametrize("kind", [dict, tuple])
def test_example_inputs_capture_at_once_and_count_no_step(kind: type) -> None:
    arguments = call(SMALL)
    lazy = lazy_compile.transform(SMALL.model(), arguments if kind is dict else kind(arguments.values()))
    assert len(lazy.branches) == 2
    assert lazy.stats.calls == 0
    assert lazy.cache_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_equals_the_original_bit_for_bit(dtype: torch.dtype) -> None:
    lazy = lazy_compile.transform(SMALL.model().to(dtype))
    arguments = call(SMALL, 3)
    arguments["x"] = arguments["x"].to(dtype)
    (output,) = run(lazy, [arguments])
    assert output.dtype == dtype
    assert same([output], run(lazy.original, [arguments]))
    lazy.policy = NEVER
    halves = [{**one, "x": one["x"].to(dtype)} for one in trajectory(SMALL, steps=3)]
    assert all(output.dtype == dtype and bool(output.isfinite().all()) for output in run(lazy, halves))


def test_to_moves_the_shared_weights_and_captures_again() -> None:
    lazy = fresh()
    assert lazy.to(torch.bfloat16) is lazy
    assert lazy.original.attn.q.weight.dtype == torch.bfloat16
    arguments = call(SMALL)
    arguments["x"] = arguments["x"].bfloat16()
    assert same(run(lazy, [arguments]), run(lazy.original, [arguments]))


def test_autocast_has_a_graph_of_its_own() -> None:
    lazy = fresh()
    plain = run(lazy, [call(SMALL)])
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(lazy, [call(SMALL)])
        assert same(cast, run(lazy.original, [call(SMALL)]))
    assert lazy.stats.captures == 2
    assert 0 < float((cast[0] - plain[0]).abs().max()) < TOLERANCE["bfloat16"] * float(plain[0].abs().max())
    assert same(run(lazy, [call(SMALL)]), plain)


def test_a_trajectory_survives_autocast_being_switched_on() -> None:
    lazy = fresh()
    lazy.policy = NEVER
    for step, arguments in enumerate(trajectory(SMALL, steps=STEPS)):
        with torch.autocast("cpu", torch.bfloat16, enabled=step >= 3):
            run(lazy, [arguments])
    # what was computed in another type is not reused
    assert [row[0] for row in reused(lazy)] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_caches_of_inference_mode_can_be_read_outside_it(compiled: Compiled) -> None:
    for reuse in ("last", "linear"):
        lazy = compiled("dit", reuse=reuse)
        lazy.policy = Decides(lambda step, branch: step == 1)
        calls = trajectory(TOYS["dit"], steps=4)
        with torch.inference_mode():
            for arguments in calls[:2]:
                lazy(**arguments)
        calls[2]["x"].requires_grad_()
        lazy(**calls[2]).sum().backward()
        assert bool(calls[2]["x"].grad.isfinite().all())
        with torch.inference_mode():
            assert lazy(**calls[3]).is_inference()
        lazy.zero_grad()


def test_it_can_be_captured_in_inference_mode_with_inference_tensors() -> None:
    lazy = lazy_compile.transform(SMALL.model())
    with torch.inference_mode():
        arguments = call(SMALL)
        first = lazy(**arguments)
    with torch.no_grad():
        assert torch.equal(lazy(**arguments), first)
    assert lazy.stats.captures == 1


def test_gradients_reach_the_input_in_evaluation_mode(shared: LazyModule) -> None:
    shared.policy = AlwaysCompute()
    gradients = []
    for model in (shared, shared.original):
        arguments = call(SMALL)
        arguments["x"].requires_grad_()
        model(**arguments).square().sum().backward()
        gradients.append(arguments["x"].grad)
    assert torch.equal(*gradients)
    shared.zero_grad()


def test_a_batch_that_changes_midway_computes_and_goes_on(shared: LazyModule) -> None:
    shared.policy = NEVER
    shared.reset_stats()
    sizes = [2, 2, 3, 3, 1]
    calls = [call(SMALL, batch, step=step) for step, batch in enumerate(sizes)]
    outputs = run(shared, calls)
    assert shared.stats.captures == 1
    assert [output.shape[0] for output in outputs] == sizes
    assert [row[0] for row in reused(shared)] == [0.0, 1.0, 1.0, 1.0]  # a row that is new begins at step 0
    for step, first_new in ((0, 0), (2, 2), (4, 0)):
        (expected,) = run(shared.original, calls[step : step + 1])
        torch.testing.assert_close(outputs[step][first_new:], expected[first_new:])


class Conditioned(Wraps):
    """Adds a condition of each row to its tokens."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.small(x + condition[:, None], t)


def guided(step: int, rows: list[int]) -> dict[str, Tensor]:
    """One latent, and some rows of three conditions: none, a text, another text."""
    arguments = call(SMALL, 1, step=step)
    condition = torch.tensor([0.0, 1.0, -1.0])[rows, None].expand(-1, WIDTH)
    return {name: item.expand(len(rows), *item.shape[1:]) for name, item in arguments.items()} | {
        "condition": condition
    }


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_guidance_that_ends_midway_goes_on_with_the_rows_that_stay(
    reuse: str, caplog: pytest.LogCaptureFixture
) -> None:
    lazy = lazy_compile.transform(randomize(Conditioned()).eval(), guided(0, [0, 1]), reuse=reuse)
    lazy.policy = Decides(lambda step, branch: step < 2)
    outputs = run(lazy, [guided(step, [0, 1] if step < 3 else [1]) for step in range(5)])
    assert [row[0] for row in reused(lazy)] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert caplog.records == []
    lazy.reset()
    alone = run(lazy, [guided(step, [1]) for step in range(5)])
    for seen, expected in zip(outputs, alone, strict=True):
        torch.testing.assert_close(seen[-1:], expected)


@pytest.mark.parametrize(("rows", "known"), [([2], 0), ([0, 1, 2], 2), ([1, 1, 1], 1)])
def test_rows_that_were_not_there_before_compute(rows: list[int], known: int) -> None:
    lazy = lazy_compile.transform(randomize(Conditioned()).eval(), guided(0, [0, 1]))
    lazy.policy = NEVER
    run(lazy, [guided(step, [0, 1] if step < 2 else rows) for step in range(3)])
    assert [row[0] for row in reused(lazy)] == [0.0, 1.0, known / len(rows)]


def test_another_resolution_runs_on_the_same_graph_where_the_model_allows_it(compiled: Compiled) -> None:
    lazy = compiled("dit")
    arguments = {**call(TOYS["dit"]), "x": torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))}
    assert same(run(lazy, [arguments]), run(lazy.original, [arguments]))
    assert lazy.stats.captures == 1


def test_another_resolution_is_captured_again_where_the_model_fixes_it(compiled: Compiled) -> None:
    lazy = compiled("cross")
    arguments = call(TOYS["cross"])
    arguments["x"] = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
    run(lazy, [call(TOYS["cross"])])
    assert same(run(lazy, [arguments]), run(lazy.original, [arguments]))
    assert lazy.stats.captures == 2
    assert same(run(lazy, [call(TOYS["cross"])]), run(lazy.original, [call(TOYS["cross"])]))
    assert lazy.stats.captures == 2


def test_only_so_many_graphs_are_kept() -> None:
    lazy = fresh(max_captures=2)
    for dtype in (torch.float64, torch.int64, torch.float32):  # the last was captured first, and is gone
        arguments = call(SMALL)
        arguments["t"] = arguments["t"].to(dtype)
        assert same(run(lazy, [arguments]), run(lazy.original, [arguments]))
    assert lazy.stats.captures == 2


class Keywords(Wraps):
    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True, **extra: Tensor) -> Any:
        result = self.small(x, t)
        for name in ("first", "second"):
            result = result + extra[name] if name in extra else result
        return {"sample": result, "none": None, "count": 3, "parts": (result * 2, [x])} if return_dict else (result,)


def test_how_a_call_is_spelled_does_not_matter() -> None:
    lazy = lazy_compile.transform(randomize(Keywords()).eval())
    x, t = call(SMALL).values()
    extra = {"first": torch.ones(1), "second": torch.zeros(1)}
    with torch.no_grad():
        expected = lazy.original(x, t, **extra)
        spellings = [
            lazy(x, t, **extra),
            lazy(t=t, x=x, **extra),
            lazy(x, second=extra["second"], first=extra["first"], t=t),
            lazy(x, t, True, **extra),
            lazy(x, t=t, return_dict=True, **extra),
        ]
        assert lazy.stats.captures == 1
        (alone,) = lazy(x, t, return_dict=False, **extra)
    for seen in spellings:
        assert list(seen) == ["sample", "none", "count", "parts"]
        assert seen["none"] is None
        assert seen["count"] == 3
        assert isinstance(seen["parts"], tuple)
        for a, b in [(seen["sample"], expected["sample"]), (seen["parts"][0], expected["parts"][0])]:
            assert torch.equal(a, b)
        assert torch.equal(seen["parts"][1][0], x)
    assert torch.equal(alone, expected["sample"])


class FixedBatch(Wraps):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.small(torch.cat([x[row : row + 1] for row in range(x.shape[0])]), t)


def test_a_model_with_a_fixed_batch_is_captured_for_each(caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(FixedBatch()).eval(), call(SMALL, 1))
    for batch in (1, 2, 1):
        assert same(run(lazy, [call(SMALL, batch)]), run(lazy.original, [call(SMALL, batch)]))
    assert lazy.stats.captures == 2
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "FixedBatch was captured again because it fixes sizes of its inputs, and they changed" in told
    assert "axis 0 of x" in told


class Remembers(Wraps):
    """Fills a table when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))[:, None]
        return self.small(x + self.table, t)


def test_a_model_that_remembers_a_table_is_left_without_one() -> None:
    lazy = lazy_compile.transform(randomize(Remembers()).eval(), call(SMALL))
    assert lazy.original.table is None
    (seen,) = run(lazy, [call(SMALL)])
    assert lazy.original.table is None
    assert same([seen], run(lazy.original, [call(SMALL)]))


class Skips(Wraps):
    """Leaves out the attention, as skip-layer guidance does."""

    def forward(self, x: Tensor, t: Tensor, without: tuple[str, ...] = ()) -> Tensor:
        h = self.small.enter(x, t)
        h = h if "attn" in without else h + self.small.attn(norm(h))
        return h + self.small.mlp(norm(h))


def test_calls_with_other_branches_keep_accounts_and_caches_of_their_own() -> None:
    lazy = lazy_compile.transform(randomize(Skips()).eval(), call(SMALL))
    lazy.policy = NEVER
    calls = [{**one, "without": skipped} for one in trajectory(SMALL, steps=3) for skipped in ((), ("attn",))]
    run(lazy, calls[:6])
    lazy.reset()
    lazy.reset_stats()
    run(lazy, calls)
    assert lazy.stats.reused.shape == (3, 1)
    run(lazy, [calls[-2]])
    assert lazy.stats.reused.shape[1] == 2
    lazy.reset()
    full, _, _, without_attention, *_ = calls
    run(lazy, [full])
    assert same(run(lazy, [without_attention]), run(lazy.original, [without_attention]))  # nothing of the attention


def test_a_schedule_holds_where_the_first_new_graph_has_fewer_branches() -> None:
    lazy = lazy_compile.transform(randomize(Skips()).eval(), call(SMALL))
    lazy.policy = Scheduled(CacheSchedule(np.array([[1, 1], [1, 0], [0, 0]], dtype=bool)))
    lazy.original.something = 1  # the graphs are dropped when a trajectory starts
    calls = trajectory(SMALL, steps=3)
    run(lazy, [{**one, "without": ("attn",)} for one in calls])
    assert reused(lazy) == [[0.0], [1.0], [1.0]]
    run(lazy, calls)
    assert reused(lazy) == [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


def test_a_policy_may_be_set_while_the_latest_graph_has_fewer_branches() -> None:
    lazy = lazy_compile.transform(randomize(Skips()).eval(), call(SMALL))
    run(lazy, [{**call(SMALL), "without": ("attn",)}])
    assert len(lazy.branches) == 1
    lazy.policy = Scheduled(CacheSchedule.every(2, steps=3, branches=2))
    with pytest.raises(ConfigError, match="the schedule has 3 branches, the model has 1"):
        lazy.policy = Scheduled(CacheSchedule.every(2, steps=3, branches=3))


def test_tensors_may_lie_in_memory_as_they_like(compiled: Compiled) -> None:
    lazy = compiled("dit")
    arguments = call(TOYS["dit"])
    for x in (
        arguments["x"].to(memory_format=torch.channels_last),
        arguments["x"].transpose(2, 3),
        torch.cat([arguments["x"]] * 2, dim=1)[:, ::2],
    ):
        time = arguments["t"][:1].expand(2)
        assert same(
            run(lazy, [{**arguments, "x": x, "t": time}]), run(lazy.original, [{**arguments, "x": x, "t": time}])
        )


# Training mode ----------------------------------------------------------------------------------------------------


class Drops(Small):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(share)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.drop(x), t)


def test_dropout_that_is_not_done_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(Drops(0.1)).eval(), call(SMALL))
    run(lazy, [call(SMALL)])
    assert not caplog.records
    run(lazy.train(), [call(SMALL), call(SMALL)])
    (record,) = caplog.records
    assert record.getMessage() == (
        "Drops is in training mode and drops values (drop), which its graph does not: a lazy model computes as in "
        "evaluation mode; call eval() on it, or train the original"
    )


def test_training_mode_without_dropout_is_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    run(lazy_compile.transform(randomize(Drops(0.0)).train()), [call(SMALL)])
    assert not caplog.records
