"""A lazy model against the original, and against an oracle that knows nothing of graphs, gates or caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, LazyModule, Learned, Policy, Scheduled
from lazy_compile.policies.gate_table import compute_logit
from lazy_compile.policies.policy import GateQuery
from support.layers import WIDTH
from support.oracle import Oracle, gates
from support.toy_models import TOLERANCE, TOYS, call, counted_by_torch, randomize, trajectory

Compiled = Callable[..., LazyModule]

STEPS = 8
WITH_ORACLE = [name for name, toy in TOYS.items() if toy.modules]


def identical(first: Any, second: Any) -> bool:
    """The same structure, the same classes, and equal bits in every tensor."""
    leaves, spec = pytree.tree_flatten(first)
    others, other_spec = pytree.tree_flatten(second)
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def assert_close(seen: Sequence[Tensor], expected: Sequence[Tensor], tolerance: str = "same batch") -> None:
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        difference = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert difference <= TOLERANCE[tolerance], f"step {step}: {difference}"


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [model(**arguments) for arguments in calls]


class Recorder(Policy):
    """Computes everywhere, and notes what gates without a bias would say."""

    def __init__(self, weight: Tensor, features: Sequence[int]) -> None:
        self.weight = weight.split(list(features), dim=1)
        self.logits: dict[tuple[int, int], Tensor] = {}

    def should_compute(self, query: GateQuery) -> bool:
        weight = self.weight[query.branch.index][query.step]
        self.logits[query.step, query.branch.index] = compute_logit(
            query.branch, query.entries, weight, torch.zeros(())
        )
        return True


def random_gates(lazy: LazyModule, calls: Sequence[dict[str, Any]], time: str, seed: int) -> GateTable:
    """One row per step, with biases that put the samples of these calls on both sides."""
    generator = torch.Generator().manual_seed(seed)
    features = tuple(branch.gate_features for branch in lazy.branches)
    knots = torch.tensor([float(arguments[time][0]) for arguments in calls], dtype=torch.float64)
    weight = torch.randn(len(calls), sum(features), generator=generator)
    lazy.policy = recorder = Recorder(weight, features)
    run(lazy, calls)
    bias = 0.3 * torch.randn(len(calls), len(features), generator=generator)
    for position, logit in recorder.logits.items():
        bias[position] -= logit.mean()
    lazy.reset_stats()
    return GateTable(features, knots, weight, bias)


# Every branch computes: the original, bit for bit -----------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_a_model_that_always_computes_equals_the_original_bit_for_bit(toy: str, compiled: Compiled) -> None:
    lazy = compiled(toy)
    captures = lazy.stats.captures
    for batch in (1, 2, 5):
        arguments = call(TOYS[toy], batch, seed=batch)
        with torch.no_grad():
            expected = lazy.original(**arguments)
            assert torch.equal(lazy(**arguments), expected)
            assert torch.equal(lazy(*arguments.values()), expected)
    assert lazy.stats.captures == captures


@pytest.fixture(scope="module")
def diffusers_dit() -> LazyModule:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return lazy_compile.transform(randomize(model).eval())


@pytest.fixture(scope="module")
def diffusers_pixart() -> LazyModule:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    return lazy_compile.transform(randomize(model).eval())


def dit_call(batch: int, step: int = 0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, batch, 4, 8, 8, generator=generator)
    return {
        "hidden_states": start + step / STEPS * (end - start),
        "timestep": torch.full((batch,), 999 - 100 * step),
        "class_labels": torch.randint(10, (batch,), generator=generator),
    }


def pixart_call(batch: int, step: int = 0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, batch, 4, 8, 8, generator=generator)
    return {
        "hidden_states": start + step / STEPS * (end - start),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
        "timestep": torch.full((batch,), 999 - 100 * step),
    }


def test_diffusers_dit_that_always_computes_equals_the_original_bit_for_bit(diffusers_dit: LazyModule) -> None:
    for batch in (2, 1, 5):
        arguments = dit_call(batch)
        with torch.no_grad():
            expected = diffusers_dit.original(**arguments)
            assert identical(diffusers_dit(**arguments), expected)
            assert identical(diffusers_dit(*arguments.values()), expected)
            assert identical(diffusers_dit(**arguments, return_dict=True), expected)
    assert diffusers_dit.stats.captures == 1


def test_the_cost_of_diffusers_dit_is_what_torch_counts(diffusers_dit: LazyModule) -> None:
    run(diffusers_dit, [dit_call(2)])
    counted = counted_by_torch(diffusers_dit.original, dit_call(2))
    assert diffusers_dit.graph.total_macs == pytest.approx(counted, rel=0.01)


def test_diffusers_pixart_that_always_computes_equals_the_original_bit_for_bit(diffusers_pixart: LazyModule) -> None:
    for batch in (2, 1, 5):
        arguments = pixart_call(batch)
        with torch.no_grad():
            expected = diffusers_pixart.original(**arguments)
            assert identical(diffusers_pixart(**arguments), expected)
            assert identical(diffusers_pixart(*arguments.values()), expected)
            assert identical(diffusers_pixart(**arguments, return_dict=True), expected)
    assert diffusers_pixart.stats.captures == 1
    plain = diffusers_pixart.original(**arguments, return_dict=False)
    assert isinstance(plain, tuple)
    assert identical(diffusers_pixart(**arguments, return_dict=False), plain)
    assert diffusers_pixart.stats.captures == 2


# Some branches reuse: the oracle ----------------------------------------------------------------------------------


def schedules(branches: int) -> dict[str, CacheSchedule]:
    return {
        "all reuse": CacheSchedule.every(STEPS, STEPS, branches),
        "every third": CacheSchedule.every(3, STEPS, branches),
        "random": CacheSchedule.random(0.5, STEPS, branches, seed=branches),
    }


@pytest.mark.parametrize("toy", WITH_ORACLE)
def test_a_schedule_gives_what_the_oracle_gives(toy: str, compiled: Compiled) -> None:
    for reuse in ("last", "linear"):
        lazy = compiled(toy, reuse=reuse)
        calls = trajectory(TOYS[toy], 2, steps=STEPS)
        dense = run(lazy.original, calls)
        for name, schedule in schedules(len(TOYS[toy].modules)).items():
            if toy == "rising":
                run(lazy, calls)  # the first trajectory shows which way time goes
            lazy.policy = Scheduled(schedule)
            seen = run(lazy, calls)
            assert_close(seen, Oracle(lazy.original, TOYS[toy].modules, schedule.should_compute, reuse).run(calls))
            assert not torch.allclose(seen[-1], dense[-1], atol=1e-3), f"{name} changed nothing"


def test_a_schedule_gives_what_the_oracle_gives_on_diffusers_models(
    diffusers_dit: LazyModule, diffusers_pixart: LazyModule
) -> None:
    for lazy, make, block in (
        (diffusers_dit, dit_call, ["attn1", "ff"]),
        (diffusers_pixart, pixart_call, ["attn1", "attn2", "ff"]),
    ):
        calls = [make(2, step) for step in range(STEPS)]
        modules = [f"transformer_blocks.{i}.{name}" for i in range(len(lazy.transformer_blocks)) for name in block]
        run(lazy, calls[:1])
        assert len(lazy.branches) == len(modules)
        schedule = CacheSchedule.random(0.6, STEPS, len(modules), seed=1)
        lazy.policy = Scheduled(schedule)
        seen = [output.sample for output in run(lazy, calls)]
        expected = Oracle(lazy.original, modules, schedule.should_compute, "linear").run(calls)
        assert_close(seen, [output.sample for output in expected])
        assert lazy.stats.lazy_ratio > 0.4


def test_slopes_say_how_far_a_reuse_follows_its_line(compiled: Compiled) -> None:
    toy = TOYS["dit"]
    lazy = compiled("dit", reuse="linear")
    calls = trajectory(toy, 3, steps=STEPS, seed=2)
    table = CacheSchedule.random(0.6, STEPS, len(lazy.branches), seed=1).should_compute
    slopes = np.random.default_rng(0).uniform(-0.5, 1.5, table.shape)
    lazy.policy = Scheduled(CacheSchedule(table, slopes))
    assert_close(run(lazy, calls), Oracle(lazy.original, toy.modules, table, "linear", slopes).run(calls))


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_learned_gates_give_what_the_oracle_gives_for_every_sample(reuse: str, compiled: Compiled) -> None:
    toy = TOYS["dit"]
    lazy = compiled("dit", reuse=reuse)
    calls = trajectory(toy, 5, steps=STEPS, seed=2)
    table = random_gates(lazy, calls, "t", seed=1)
    lazy.policy = Learned(table)
    weights = table.weight.double().numpy().reshape(STEPS, len(lazy.branches), WIDTH)
    oracle = Oracle(lazy.original, toy.modules, gates(weights, table.bias.double().numpy()), reuse)
    assert_close(run(lazy, calls), oracle.run(calls))
    assert 0.2 < lazy.stats.lazy_ratio < 0.8
    assert lazy.stats.decisions_varying_between_samples > 0.3
    assert np.array_equal(lazy.stats.reused, 5 - np.array(oracle.decisions).sum(axis=2))


# A batch is as good as its samples one by one ---------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["dit", "mmdit", "parallel", "cross", "uvit", "hand_written"])
def test_a_batch_gives_what_its_samples_give_one_by_one(toy: str, compiled: Compiled) -> None:
    for reuse in ("last", "linear"):
        lazy = compiled(toy, reuse=reuse)
        assert all(branch.row_separable for branch in lazy.branches)
        calls = trajectory(TOYS[toy], 4, steps=STEPS, seed=5)
        lazy.policy = Learned(random_gates(lazy, calls, TOYS[toy].time, seed=3))
        together = run(lazy, calls)
        assert lazy.stats.decisions_varying_between_samples > 0.5
        for row in range(4):
            alone = run(lazy, [{name: value[row : row + 1] for name, value in one.items()} for one in calls])
            assert_close([output[row : row + 1] for output in together], alone, "another batch")


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a model that all examples share
)
@given(data=st.data())
def test_for_any_gates_a_batch_gives_what_its_samples_give(compiled: Compiled, data: st.DataObject) -> None:
    lazy = compiled("container")
    rows, steps = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 5))
    calls = trajectory(TOYS["container"], rows, steps=steps, seed=data.draw(st.integers(0, 1000)))
    gate = st.floats(-3, 3, allow_nan=False, width=16)
    branches = lazy.branches
    bias = [[data.draw(gate) for _ in branches] for _ in calls]
    scale = data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    table = random_gates(lazy, calls, "t", seed=data.draw(st.integers(0, 1000)))
    table = GateTable(table.features, table.knots, scale * table.weight, torch.tensor(bias))
    age = data.draw(st.sampled_from([None, 1, 2]))
    lazy.lazy_config = lazy_compile.LazyConfig(reuse=data.draw(st.sampled_from(["last", "linear"])), max_reuse_age=age)
    lazy.policy = Learned(table)
    together = run(lazy, calls)
    for row in range(rows):
        lazy.reset()
        alone = run(lazy, [{name: value[row : row + 1] for name, value in one.items()} for one in calls])
        assert_close([output[row : row + 1] for output in together], alone, "another batch")


def test_a_branch_whose_rows_mix_takes_one_decision_for_the_batch(compiled: Compiled) -> None:
    toy = TOYS["windowed"]
    lazy = compiled("windowed", reuse="last")
    attention, mlp = lazy.branches
    assert not attention.row_separable
    assert mlp.row_separable
    calls = trajectory(toy, 3, steps=STEPS)
    table = random_gates(lazy, calls, "timestep", seed=4)
    lazy.policy = Learned(table)
    seen = run(lazy, calls)
    decisions = lazy.stats.reuse_table
    assert set(decisions[:, 0]) == {0.0, 1.0}
    assert set(decisions[:, 1]) > {0.0, 1.0}

    def decide(step: int, branch: int, entry: Tensor) -> list[bool]:
        if step == 0:
            return [True] * len(entry)
        weight = table.weight.double()[step, WIDTH * branch : WIDTH * (branch + 1)]
        pooled = entry.double().mean(dim=1) if branch else entry.double().mean(dim=(0, 1))[None].expand(len(entry), -1)
        return (pooled @ weight + table.bias.double()[step, branch] > 0).tolist()

    assert_close(seen, Oracle(lazy.original, toy.modules, decide, "last").run(calls))
