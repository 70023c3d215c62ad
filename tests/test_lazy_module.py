"""The lazy model as a user meets it: a drop-in for the original that minds its own trajectories."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, GateTable, LazyConfig, LazyModule, Learned, Policy, Scheduled
from lazy_compile.errors import CaptureError, ConfigError, NoBranchError
from lazy_compile.gate import FORCE
from lazy_compile.policy import GateQuery
from models import (
    MLP,
    REFUSED,
    TOKENS,
    TOLERANCE,
    TOYS,
    WIDTH,
    Attention,
    SwiGLU,
    Toy,
    call,
    norm,
    randomize,
    sinusoid,
    trajectory,
)

Compiled = Callable[..., LazyModule]

STEPS = 6


class Small(nn.Module):
    """One attention and one MLP: quick to capture."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks(self.enter(x, t))

    def enter(self, x: Tensor, t: Tensor) -> Tensor:
        return x + sinusoid(t, WIDTH).to(x.dtype)[:, None]

    def blocks(self, h: Tensor) -> Tensor:
        h = h + self.attn(norm(h))
        return h + self.mlp(norm(h))


SMALL = Toy(Small, {"x": (TOKENS, WIDTH), "t": ()}, (("attn", "self_attention"), ("mlp", "mlp")), ("attn", "mlp"), "t")
RISING = replace(SMALL, rising=True)


class Decides(Policy):
    """Asks a function of step, branch and rows."""

    def __init__(self, decide: Callable[[int, int], Any]) -> None:
        self.decide = decide
        self.timesteps: list[float] = []

    def should_compute(self, query: GateQuery) -> bool | Tensor:
        self.timesteps.append(query.timestep)
        answer = self.decide(query.step, query.branch.index)
        return answer if isinstance(answer, bool) else torch.as_tensor(answer)


NEVER = Decides(lambda step, branch: False)


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [model(**arguments) for arguments in calls]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def reused(lazy: LazyModule) -> list[list[float]]:
    return lazy.stats.reuse_table.tolist()


def fresh(**options: Any) -> LazyModule:
    """A small model of its own, whose weights a test may change."""
    return lazy_compile.transform(SMALL.model(), call(SMALL), **options)


@pytest.fixture(scope="module")
def shared() -> LazyModule:
    return fresh()


class Wraps(nn.Module):
    """The small model, called in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small()


# The original is left alone, and followed -------------------------------------------------------------------------


def test_the_original_is_not_modified() -> None:
    model = SMALL.model().train()
    model.attn.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: (id(module), dict(vars(module))) for name, module in model.named_modules()}
    lazy = lazy_compile.transform(model, call(SMALL))
    lazy.policy = NEVER
    run(lazy, trajectory(SMALL, steps=3))
    assert {name: (id(module), dict(vars(module))) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.attn.training
    assert lazy_compile.restore(lazy) is model


def test_parameters_are_shared() -> None:
    lazy = fresh()
    assert {id(parameter) for parameter in lazy.parameters()} == {id(p) for p in lazy.original.parameters()}


def test_a_weight_that_changes_in_place_takes_effect_at_once() -> None:
    lazy = fresh()
    before = run(lazy, [call(SMALL)])
    with torch.no_grad():
        lazy.original.mlp.up.weight.mul_(2)
    after = run(lazy, [call(SMALL)])
    assert not same(before, after)
    assert same(after, run(lazy.original, [call(SMALL)]))


def test_a_parameter_that_is_assigned_takes_effect_at_once() -> None:
    lazy = fresh()
    model = lazy.original
    model.mlp.up.weight = nn.Parameter(2 * model.mlp.up.weight.detach())
    assert same(run(lazy, [call(SMALL)]), run(model, [call(SMALL)]))
    assert lazy.stats.captures == 1


def replace_a_module(model: nn.Module) -> None:
    model.mlp = randomize(SwiGLU(), seed=9)


def change_an_attribute(model: nn.Module) -> None:
    model.scale = 2.0


def add_a_hook(model: nn.Module) -> None:
    model.attn.register_forward_hook(lambda module, inputs, output: 2 * output)


def replace_a_plain_tensor(model: nn.Module) -> None:
    model.table = torch.ones(WIDTH)


class Changing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.table = 1.0, torch.zeros(WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks(self.enter(x, t) + self.table) * self.scale


def test_another_change_takes_effect_at_the_next_trajectory() -> None:
    model = randomize(Changing()).eval()
    lazy = lazy_compile.transform(model)
    before = run(lazy, [call(SMALL, step=1)])
    for change in (replace_a_module, change_an_attribute, add_a_hook, replace_a_plain_tensor):
        change(model)
        lazy.reset()
        after = run(lazy, [call(SMALL, step=1)])
        assert same(after, run(model, [call(SMALL, step=1)])), change.__name__
        assert not same(after, before), change.__name__
        before = after


def test_a_change_is_not_forgotten_while_another_kind_of_call_is_captured() -> None:
    lazy = fresh()
    replace_a_module(lazy.original)
    arguments = call(SMALL)
    run(lazy, [{**arguments, "t": arguments["t"].double()}])
    lazy.reset()
    assert same(run(lazy, [arguments]), run(lazy.original, [arguments]))


# When it captures -------------------------------------------------------------------------------------------------


def test_nothing_is_captured_before_the_first_call() -> None:
    lazy = lazy_compile.transform(SMALL.model())
    with pytest.raises(ConfigError) as caught:
        _ = lazy.branches
    assert str(caught.value) == "this model was not captured yet; call it once, or pass example_inputs to transform()"
    run(lazy, [call(SMALL)])
    assert [branch.name for branch in lazy.branches] == [name for name, _ in SMALL.branches]


@pytest.mark.parametrize("kind", [dict, tuple])
def test_example_inputs_capture_at_once_and_do_not_run_the_model(kind: type) -> None:
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
    assert [row[0] for row in reused(shared)] == [0.0, 1.0, 0.0, 1.0, 0.0]
    for step in (0, 2, 4):
        assert same(outputs[step : step + 1], run(shared.original, calls[step : step + 1]))


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


class Scaled(Wraps):
    def forward(self, x: Tensor, t: Tensor, scale: float, causal: bool = False) -> Tensor:
        return self.small(x, t) * scale


def test_a_number_that_changes_is_captured_again_and_told(caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(Scaled()).eval())
    arguments = call(SMALL)
    for scale in (1.0, 2.0):
        assert same(run(lazy, [{**arguments, "scale": scale}]), run(lazy.original, [{**arguments, "scale": scale}]))
    (record,) = caplog.records
    assert record.getMessage() == (
        "Scaled was captured again for another value of a Python number: such a value is part of the graph; "
        "pass what changes from step to step as a tensor"
    )
    run(lazy, [{**arguments, "scale": 1.0, "causal": True}])
    assert len(caplog.records) == 1  # a switch is no number


class FixedBatch(Wraps):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.small(x.reshape(int(x.shape[0]), -1, WIDTH), t)


def test_a_model_with_a_fixed_batch_is_captured_for_each() -> None:
    lazy = lazy_compile.transform(randomize(FixedBatch()).eval(), call(SMALL, 1))
    for batch in (1, 2, 1):
        assert same(run(lazy, [call(SMALL, batch)]), run(lazy.original, [call(SMALL, batch)]))
    assert lazy.stats.captures == 2


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


# Trajectories -----------------------------------------------------------------------------------------------------


def test_a_new_trajectory_starts_without_help(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    graph = lazy.graph
    calls = trajectory(TOYS["dit"], steps=STEPS)
    first, other = run(lazy, calls), run(lazy, trajectory(TOYS["dit"], steps=STEPS, seed=1))
    second = run(lazy, calls)
    assert same(first, second)
    assert not same(first, other)
    assert [row[0] for row in reused(lazy)] == [0.0, *[1.0] * (STEPS - 1)]
    assert lazy.stats.calls == 3 * STEPS
    assert lazy.graph is graph


def test_two_calls_a_step_are_two_streams(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = Scheduled(CacheSchedule.random(0.5, STEPS, 4, seed=0))
    conditional = trajectory(TOYS["dit"], steps=STEPS)
    unconditional = [{**arguments, "y": torch.zeros(2, dtype=torch.int64)} for arguments in conditional]
    alone = [run(lazy, calls) for calls in (conditional, unconditional)]
    one_stream = lazy.cache_bytes
    for _ in range(2):  # the second image as well
        together = run(lazy, [call for pair in zip(conditional, unconditional, strict=True) for call in pair])
        assert same(together[0::2], alone[0])
        assert same(together[1::2], alone[1])
    assert lazy.cache_bytes == 2 * one_stream > 0


def test_guidance_in_one_batch_keeps_its_rows_apart(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = Decides(lambda step, branch: [True, False, step % 2 == 0, False])
    calls = trajectory(TOYS["dit"], 4, steps=STEPS)
    run(lazy, calls)
    assert reused(lazy) == [[0.0] * 4] + [[0.5 if step % 2 == 0 else 0.75] * 4 for step in range(1, STEPS)]


def test_rising_time_is_learned_in_the_first_trajectory() -> None:
    lazy = lazy_compile.transform(RISING.model())
    schedule = CacheSchedule(np.array([[1, 1], [1, 1], [0, 0], [1, 0], [0, 0], [1, 1]], dtype=bool))
    lazy.policy = Scheduled(schedule)
    calls = trajectory(RISING, steps=STEPS)
    first, second = run(lazy, calls), run(lazy, calls)
    assert same(first[:2], second[:2])
    lazy.reset_stats()
    third = run(lazy, calls)
    assert same(second, third)
    assert reused(lazy) == (1.0 - schedule.should_compute).tolist()


def test_the_first_trajectory_of_rising_time_follows_the_schedule_once_it_is_known() -> None:
    lazy = lazy_compile.transform(RISING.model())
    lazy.policy = Scheduled(CacheSchedule(np.array([[1, 1], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0]], dtype=bool)))
    calls = trajectory(RISING, steps=STEPS)
    first, second = run(lazy, calls), run(lazy, calls)
    assert same(first, second)


def test_a_model_without_time_counts_its_calls_and_is_reset_by_hand(compiled: Compiled) -> None:
    lazy = compiled("no_time")
    lazy.policy = policy = Decides(lambda step, branch: step % 3 == 0)
    calls = trajectory(TOYS["no_time"], steps=4)
    first = run(lazy, calls)
    assert policy.timesteps[::2] == [1.0, 2.0, 3.0]
    lazy.reset()
    assert same(run(lazy, calls), first)
    assert not same(run(lazy, calls), first)


def test_the_time_of_a_query_is_the_models_own(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = policy = Decides(lambda step, branch: True)
    run(lazy, trajectory(TOYS["dit"], steps=4))
    assert policy.timesteps[::4] == [749.0, 500.0, 250.0]


def test_threads_have_streams_of_their_own() -> None:
    lazy = lazy_compile.transform(SMALL.model())  # the threads also race for the capture
    lazy.policy = Scheduled(CacheSchedule.random(0.5, STEPS, 2, seed=2))
    seeds = range(4)
    results: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(len(seeds), timeout=60)

    def work(seed: int) -> None:
        barrier.wait()
        calls = trajectory(SMALL, steps=STEPS, seed=seed)
        run(lazy, calls)
        results[seed] = run(lazy, calls)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lazy.stats.captures == 1
    assert lazy.stats.evaluated.sum() == 4 * 2 * STEPS * 2 * 2  # threads, runs, steps, branches, rows
    for seed in seeds:
        calls = trajectory(SMALL, steps=STEPS, seed=seed)
        run(lazy, calls)
        assert same(results[seed], run(lazy, calls))


def test_named_streams_are_trajectories_of_their_own(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    calls = [trajectory(TOYS["dit"], steps=STEPS, seed=seed) for seed in (1, 2)]
    alone = [run(lazy, each) for each in calls]
    lazy.reset()
    together: list[list[Tensor]] = [[], []]
    for step in range(STEPS):
        for number in (0, 1):
            with lazy.stream(f"request {number}"):
                later = max(0, step - 2 * number)  # the second request is two steps behind
                together[number] += run(lazy, [calls[number][later]]) if step >= 2 * number else []
    assert same(together[0], alone[0])
    assert same(together[1], alone[1][: STEPS - 2])


def test_reset_makes_the_next_call_compute(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    calls = trajectory(TOYS["dit"], steps=3)
    run(lazy, calls[:2])
    assert lazy.cache_bytes > 0
    lazy.reset()
    assert lazy.cache_bytes == 0
    assert same(run(lazy, calls[2:]), run(lazy.original, calls[2:]))


def test_a_new_policy_starts_a_trajectory(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    run(lazy, calls[:2])
    lazy.policy = NEVER
    assert same(run(lazy, calls[2:]), run(lazy.original, calls[2:]))


# Limits -----------------------------------------------------------------------------------------------------------


def test_warmup_steps_compute(compiled: Compiled) -> None:
    lazy = compiled("dit", warmup_steps=3)
    lazy.policy = NEVER
    run(lazy, trajectory(TOYS["dit"], steps=STEPS))
    assert [row[0] for row in reused(lazy)] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("age", "pattern"), [(1, "crcrcrcr"), (2, "crrcrrcr"), (None, "crrrrrrr")])
def test_no_branch_is_reused_longer_than_the_greatest_age(age: int | None, pattern: str, compiled: Compiled) -> None:
    lazy = compiled("dit", max_reuse_age=age)
    lazy.policy = NEVER
    run(lazy, trajectory(TOYS["dit"], steps=8))
    assert "".join("cr"[int(row[0])] for row in reused(lazy)) == pattern


def test_age_is_counted_for_every_row(compiled: Compiled) -> None:
    lazy = compiled("dit", max_reuse_age=2)
    lazy.policy = Decides(lambda step, branch: [step == 1, False])
    run(lazy, trajectory(TOYS["dit"], steps=5))
    # row 0 computes at 0, 1, 4; row 1 at 0, 3
    assert [row[0] for row in reused(lazy)] == [0.0, 0.5, 1.0, 0.5, 0.5]


def test_a_gate_that_is_not_a_number_computes(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    knots = torch.tensor([float(arguments["t"][0]) for arguments in calls])
    table = GateTable.constant(lazy.branches, knots, bias=-FORCE)
    table.weight[1, 0] = math.nan  # branch 0 at step 1
    lazy.policy = Learned(table)
    run(lazy, calls)
    assert reused(lazy) == [[0.0] * 4, [0.0, 1.0, 1.0, 1.0], [1.0] * 4]


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ("per_sample", [0.25, 0.5, 0.75, 1.0]),
        ("all_reuse", [0.0, 0.0, 0.0, 1.0]),
        ("majority", [0.0, 0.0, 1.0, 1.0]),
        ("any_reuse", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_batch_rule_joins_the_decisions_of_rows(rule: str, shares: list[float], compiled: Compiled) -> None:
    lazy = compiled("dit", batch_rule=rule)
    rows_that_reuse = [1, 2, 3, 4]
    lazy.policy = Decides(lambda step, branch: [row >= rows_that_reuse[branch] for row in range(4)])
    run(lazy, trajectory(TOYS["dit"], 4, steps=2))
    assert reused(lazy) == [[0.0] * 4, shares]


def test_the_shift_of_learned_gates_is_a_dial(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    table = GateTable.constant(lazy.branches, torch.tensor([500.0]), bias=0.5)
    for shift, ratio in ((0.0, 0.0), (-1.0, 2 / 3), (1.0, 0.0)):
        lazy.policy = Learned(table, shift=shift)
        lazy.reset_stats()
        run(lazy, calls)
        assert lazy.stats.lazy_ratio == pytest.approx(ratio)


# Accounts ---------------------------------------------------------------------------------------------------------


def test_ratios_are_those_counted_by_hand(shared: LazyModule) -> None:
    attention = TOKENS * 4 * WIDTH * WIDTH + 2 * TOKENS * TOKENS * WIDTH
    mlp = TOKENS * 2 * WIDTH * 2 * WIDTH
    total = attention + mlp
    shared.policy = Decides(lambda step, branch: [branch == 0, step != 2])
    shared.reset_stats()
    run(shared, trajectory(SMALL, steps=3))
    rows = 2
    assert [branch.macs for branch in shared.branches] == [rows * attention, rows * mlp]
    assert shared.stats.total_macs == rows * total
    # step 1: row 0 computes the attention, row 1 both; step 2: row 0 computes the attention, row 1 nothing
    assert reused(shared) == [[0.0, 0.0], [0.0, 0.5], [0.5, 1.0]]
    assert shared.stats.lazy_ratio == pytest.approx((0 + 1 + 1 + 2) / 12)
    saved = (1 * attention + 3 * mlp) / 6
    assert shared.stats.compute_ratio == pytest.approx(1 - saved / total)
    assert shared.stats.decisions_varying_between_samples == pytest.approx(2 / 4)
    assert shared.stats.calls == 3


def test_ratios_of_a_schedule_are_those_it_promises(compiled: Compiled) -> None:
    lazy = compiled("mmdit")
    schedule = CacheSchedule.random(0.4, STEPS, len(lazy.branches), seed=3)
    lazy.policy = Scheduled(schedule)
    run(lazy, trajectory(TOYS["mmdit"], steps=STEPS))
    assert lazy.stats.lazy_ratio == pytest.approx(schedule.lazy_ratio)
    macs = [branch.macs for branch in lazy.branches]
    assert lazy.stats.compute_ratio == pytest.approx(schedule.compute_ratio(macs, lazy.graph.total_macs))


def test_statistics_start_again_at_reset_stats(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    run(lazy, trajectory(TOYS["dit"], steps=3))
    lazy.reset_stats()
    assert (lazy.stats.calls, lazy.stats.lazy_ratio, lazy.stats.compute_ratio) == (0, 0.0, 1.0)
    assert lazy.stats.reuse_table.size == 0


@pytest.mark.parametrize("toy", ["dit", "mmdit", "parallel", "windowed"])
def test_caches_take_the_memory_that_was_foretold(toy: str, compiled: Compiled) -> None:
    for reuse, kept in (("last", 1), ("linear", 2)):
        lazy = compiled(toy, reuse=reuse)
        run(lazy, trajectory(TOYS[toy], steps=3))
        assert lazy.cache_bytes == lazy.expected_cache_bytes
        assert lazy.expected_cache_bytes == kept * sum(branch.output_bytes for branch in lazy.branches)


def test_an_example_batch_of_one_is_told_as_one() -> None:
    lazy = lazy_compile.transform(SMALL.model(), call(SMALL, 1))
    run(lazy, trajectory(SMALL, 1, steps=3))
    assert lazy.cache_bytes == lazy.expected_cache_bytes == 2 * 2 * TOKENS * WIDTH * 4
    assert [entry.shape for branch in lazy.branches for entry in branch.entries] == [(1, TOKENS, WIDTH)] * 2
    assert lazy.branches[1].macs == TOKENS * 2 * WIDTH * 2 * WIDTH
    assert all(branch.row_separable for branch in lazy.branches)


# A module among modules -------------------------------------------------------------------------------------------


def test_a_deep_copy_shares_nothing(shared: LazyModule) -> None:
    shared.policy = AlwaysCompute()
    twin = copy.deepcopy(shared)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert same(run(shared, [call(SMALL)]), run(SMALL.model(), [call(SMALL)]))
    assert not same(run(twin, [call(SMALL)]), run(shared, [call(SMALL)]))
    assert twin.lazy_config == shared.lazy_config
    assert twin.cache_bytes > 0
    assert twin.original is not shared.original


def test_a_state_dict_has_the_names_of_the_original(shared: LazyModule) -> None:
    state = shared.state_dict()
    assert list(state) == list(shared.original.state_dict())
    other = lazy_compile.transform(Small().eval())
    other.load_state_dict(state)
    assert same(run(other.original, [call(SMALL)]), run(shared.original, [call(SMALL)]))


def test_a_lazy_model_is_saved_and_loaded_as_a_part_of_another(shared: LazyModule) -> None:
    whole, other = (nn.ModuleDict({"denoiser": model}) for model in (shared, lazy_compile.transform(Small())))
    state = whole.state_dict()
    assert list(state) == [f"denoiser.{name}" for name in shared.original.state_dict()]
    other.load_state_dict(state)
    assert torch.equal(other["denoiser"].original.attn.q.weight, shared.original.attn.q.weight)
    assert list(state) == [f"denoiser.{name}" for name in shared.original.state_dict()]
    plain = nn.ModuleDict({"denoiser": Small()})
    plain.load_state_dict(state)
    del state["denoiser.attn.q.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "denoiser\.original\.attn\.q\.bias"'):
        other.load_state_dict(state)


def test_other_attributes_are_those_of_the_original(shared: LazyModule) -> None:
    shared.original.config = {"sample_size": 8}  # a pipeline reads it
    try:
        assert shared.config == {"sample_size": 8}
        assert shared.attn is shared.original.attn
        with pytest.raises(AttributeError, match="'Small' object has no attribute 'nothing'"):
            _ = shared.nothing
    finally:
        del shared.original.config


class ShowsFeatures(Wraps):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.small.enter(x, t)
        features = self.small.attn(norm(h))
        h = h + features
        h = h + self.small.mlp(norm(h))
        return h, features, features.transpose(1, 2)


def test_a_caller_may_write_to_what_he_receives() -> None:
    lazy = lazy_compile.transform(randomize(ShowsFeatures()).eval(), call(SMALL), reuse="last")
    lazy.policy = NEVER
    calls = trajectory(SMALL, steps=4)
    kept = [tuple(tensor.clone() for tensor in outputs) for outputs in run(lazy, calls)]
    lazy.reset()
    with torch.no_grad():
        for arguments, expected in zip(calls, kept, strict=True):
            outputs = lazy(**arguments)
            assert same(outputs, expected)
            for tensor in outputs:
                tensor.zero_()


def test_a_driver_answers_every_call_and_leaves_no_trace(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    seen = []

    def drive(model_call: Any) -> str:
        seen.append((model_call.step, model_call.timestep))
        return "driven"

    run(lazy, calls[:2])
    with lazy.driven_by(drive):
        assert run(lazy, calls) == ["driven"] * 3
    assert seen == [(0, 999.0), (1, 666.0), (2, 333.0)]
    assert same(run(lazy, calls), run(lazy.original, calls))


# Refusals ---------------------------------------------------------------------------------------------------------


def message(error: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_argument_is_named_with_the_signature(shared: LazyModule) -> None:
    assert message(ConfigError, lambda: shared(torch.ones(2, TOKENS, WIDTH), timestep=torch.ones(2))) == (
        "Small.forward: missing a required argument: 't'; its signature is (x: 'Tensor', t: 'Tensor') -> 'Tensor'"
    )
    assert message(ConfigError, lambda: shared(**call(SMALL), guidance=3.0)) == (
        "Small.forward: got an unexpected keyword argument 'guidance'; its signature is "
        "(x: 'Tensor', t: 'Tensor') -> 'Tensor'"
    )


def test_a_policy_of_the_wrong_type_is_refused(shared: LazyModule) -> None:
    def assign() -> None:
        shared.policy = "always"

    assert message(ConfigError, assign) == (
        "policy is 'always'; expected AlwaysCompute(), Scheduled(schedule), Learned(table) or another Policy"
    )


def test_a_schedule_of_another_model_is_refused(shared: LazyModule) -> None:
    policy = Scheduled(CacheSchedule.every(2, 5, branches=3))

    def assign() -> None:
        shared.policy = policy

    expected = "the schedule has 3 branches, the model has 2; plan a schedule for this model"
    assert message(ConfigError, assign) == expected
    late = lazy_compile.transform(SMALL.model())
    late.policy = policy  # nothing is known of the model yet
    assert message(ConfigError, lambda: late(**call(SMALL))) == expected


def test_gates_of_another_model_are_refused(shared: LazyModule) -> None:
    table = GateTable((8, 8, 8), torch.zeros(1), torch.zeros(1, 24), torch.zeros(1, 3))

    def assign() -> None:
        shared.policy = Learned(table)

    assert message(ConfigError, assign) == (
        "the gate table is for 3 branches with 24 features, the model has 2 with 64; calibrate gates for this model"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resue": "last"}, "unknown option 'resue'; the options are batch_rule, "),
        ({"reuse": "cubic"}, "reuse is 'cubic'; expected one of 'last', 'linear'"),
        ({"batch_rule": "mean"}, "batch_rule is 'mean'; expected one of 'per_sample', 'all_reuse', "),
        ({"warmup_steps": 0}, "warmup_steps is 0; at least 1 step must compute to fill the caches"),
        ({"max_reuse_age": 0}, "max_reuse_age is 0; use 1 or more, or None for no limit"),
        ({"max_captures": 0}, "max_captures is 0; use 1 or more"),
        ({"config": {"reuse": "last"}}, "config is a dict; expected LazyConfig(...), or give options by name"),
        (
            {"config": LazyConfig(), "reuse": "last"},
            "give either config or options by name, not both; seen both config and reuse",
        ),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], expected: str) -> None:
    assert message(ConfigError, lambda: lazy_compile.transform(Small(), **options)).startswith(expected)


def test_a_timestep_input_that_does_not_exist_is_refused() -> None:
    lazy = lazy_compile.transform(SMALL.model(), timestep_input="timestep")
    assert message(ConfigError, lambda: lazy(**call(SMALL))) == (
        "timestep_input is 'timestep'; the tensor inputs of this model are x, t"
    )


def test_what_is_no_model_is_refused(shared: LazyModule) -> None:
    assert message(ConfigError, lambda: lazy_compile.transform(shared)) == (
        "this model is lazy already; use restore() to get the original back"
    )
    assert message(ConfigError, lambda: lazy_compile.transform(lambda x: x)) == (
        "transform() takes a torch.nn.Module; seen function"
    )
    assert message(ConfigError, lambda: lazy_compile.restore(shared.original)) == (
        "restore() takes what transform() returned; seen Small"
    )
    assert message(ConfigError, lambda: lazy_compile.transform(Small(), torch.ones(2, TOKENS, WIDTH))) == (
        "example_inputs is a Tensor; expected a dictionary of arguments, or a tuple"
    )


def test_a_model_that_branches_on_values_is_refused() -> None:
    toy = REFUSED["data_dependent"]
    text = message(CaptureError, lambda: lazy_compile.transform(toy.model(), call(toy)))
    assert text.startswith("TinyDataDependent could not be captured; export, dynamic sizes: GuardOnDataDependentSym")
    assert text.endswith(
        ". Check that the example inputs run through the model, and that forward() does not branch on the values of "
        "tensors"
    )


def test_a_model_with_nothing_to_gate_is_refused_with_the_reasons() -> None:
    plain, unet = REFUSED["plain"], REFUSED["unet"]
    assert message(NoBranchError, lambda: lazy_compile.transform(plain.model(), call(plain))) == (
        "PlainMLP has no residual branch that could be gated (no addition joins a skip connection with heavy operators)"
    )
    assert message(NoBranchError, lambda: lazy_compile.transform(unet.model(), call(unet))) == (
        "TinyUNet has no residual branch that could be gated "
        "(outer: convolution block; gate it with conv_branches=True; "
        "inner: convolution block; gate it with conv_branches=True)"
    )
