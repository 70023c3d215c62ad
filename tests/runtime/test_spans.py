"""Models whose blocks are computed or reused in spans: against the original, and against an oracle of plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Learned, Policy, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import BranchKind
from lazy_compile.policies.gate_table import GateTable
from lazy_compile.policies.policy import GateQuery
from support.span_oracle import SpanOracle, Streams
from support.toy_models import TOLERANCE, TOYS, call, randomize, trajectory

STEPS = 8


Compiled = Callable[..., LazyModule]


@torch.no_grad()
def run(model: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    outputs = [model(**arguments) for arguments in calls]
    return [output if isinstance(output, Tensor) else output[0] for output in outputs]


def assert_close(seen: list[Tensor], expected: list[Tensor]) -> None:
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        difference = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert difference <= TOLERANCE["another batch"], f"step {step}: {difference}"


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
    return {"x": args[0]}


def whole(result: Tensor) -> Streams:
    return {"x": result}


def replaced(streams: Streams, result: Tensor) -> Tensor:
    return streams["x"]


ONE_STREAM = (first_of, whole, replaced)
TWO_STREAMS = (
    lambda args, kwargs: {"x": args[0], "text": args[1]},
    lambda result: {"x": result[0], "text": result[1]},
    lambda streams, result: (streams["x"], streams["text"]),
)

BLOCKS = [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")]
STACK = [("blocks.0", "blocks.1")]


@pytest.mark.parametrize(
    ("toy", "granularity", "spans", "streams"),
    [
        ("dit", "block", BLOCKS, ONE_STREAM),
        ("dit", "model", STACK, ONE_STREAM),
        ("cross", "model", STACK, ONE_STREAM),
        ("mmdit", "block", BLOCKS, TWO_STREAMS),
        ("mmdit", "model", STACK, TWO_STREAMS),
        ("parallel", "model", STACK, ONE_STREAM),
        ("uvit", 3, [("down", "down"), ("middle", "middle")], ONE_STREAM),
    ],
)
def test_spans_give_what_the_oracle_gives(
    toy: str, granularity: object, spans: Any, streams: Any, compiled: Compiled
) -> None:
    lazy = compiled(toy, granularity=granularity)
    assert all(branch.kind is BranchKind.SPAN and branch.row_separable for branch in lazy.branches)
    for batch in (1, 3):
        assert torch.equal(*run(lazy, [call(TOYS[toy], batch)]), *run(lazy.original, [call(TOYS[toy], batch)]))
    calls = trajectory(TOYS[toy], 2, steps=STEPS)
    table = CacheSchedule.random(0.6, STEPS, len(lazy.branches), seed=1).should_compute.copy()
    table[:, len(spans) :] = True  # of U-ViT the span that merges a long skip connection is not one module
    for reuse, order in (("last", 0), ("linear", 1), ("taylor", 2)):
        lazy.lazy_config = lazy_compile.LazyConfig(reuse=reuse, granularity=granularity)
        lazy.policy = Scheduled(CacheSchedule(table))
        assert_close(run(lazy, calls), SpanOracle(lazy.original, spans, *streams, table, order).run(calls))
        assert lazy.stats.lazy_ratio > 0.2


def sd3() -> tuple[nn.Module, Any]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip

    def make(step: int, batch: int = 2) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        start, end = torch.randn(2, batch, 4, 8, 8, generator=generator)
        return {
            "hidden_states": start + step / STEPS * (end - start),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
            "pooled_projections": torch.randn(batch, 8, generator=generator),
            "timestep": torch.full((batch,), 999.0 - 100 * step),
        }

    return randomize(model).eval(), make


def flux() -> tuple[nn.Module, Any]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def make(step: int, batch: int = 2) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        start, end = torch.randn(2, batch, 16, 4, generator=generator)
        return {
            "hidden_states": start + step / STEPS * (end - start),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
            "pooled_projections": torch.randn(batch, 8, generator=generator),
            "timestep": torch.full((batch,), 1.0 - 0.1 * step),
            "img_ids": torch.randint(4, (16, 3), generator=generator).float(),
            "txt_ids": torch.zeros(5, 3),
        }

    return randomize(model).eval(), make


JOINT = (
    lambda args, kwargs: {"text": kwargs["encoder_hidden_states"], "x": kwargs["hidden_states"]},
    lambda result: {name: value for name, value in zip(("text", "x"), result, strict=True) if value is not None},
    lambda streams, result: (streams.get("text"), streams["x"]),
)
slow = partial(pytest.param, marks=pytest.mark.slow)
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@pytest.mark.parametrize(
    ("build", "granularity", "spans"),
    [
        slow(flux, 2, [(f"{DOUBLE}.0", f"{DOUBLE}.1"), (f"{SINGLE}.0", f"{SINGLE}.1")]),
        slow(flux, "model", [(f"{DOUBLE}.0", f"{SINGLE}.1")]),
        slow(flux, "block", [(f"{name}.{i}",) * 2 for name in (DOUBLE, SINGLE) for i in range(2)]),
        (sd3, "model", [(f"{DOUBLE}.0", f"{DOUBLE}.2")]),
        slow(sd3, "block", [(f"{DOUBLE}.{i}",) * 2 for i in range(3)]),
    ],
)
def test_spans_of_diffusers_models_give_what_the_oracle_gives(build: Any, granularity: object, spans: Any) -> None:
    model, make = build()
    lazy = lazy_compile.transform(model, make(0), granularity=granularity)
    assert len(lazy.branches) == len(spans)
    calls = [{**make(step), "return_dict": False} for step in range(STEPS)]
    assert torch.equal(*run(lazy, calls[:1]), *run(model, calls[:1]))
    table = CacheSchedule.random(0.6, STEPS, len(spans), seed=2).should_compute
    lazy.policy = Scheduled(CacheSchedule(table))
    expected = [output for (output,) in SpanOracle(model, spans, *JOINT, table, 1).run(calls)]
    assert_close(run(lazy, calls), expected)


def test_every_row_decides_for_its_spans(compiled: Compiled) -> None:
    lazy = compiled("mmdit", granularity="block", reuse="taylor")
    calls = trajectory(TOYS["mmdit"], 4, steps=STEPS, seed=5)

    class Rows(Policy):
        """Decides by what the streams of each row are."""

        def should_compute(self, query: GateQuery) -> Tensor:
            image, text = query.entries
            return torch.sin(100 * (image.mean((1, 2)) + text.mean((1, 2))) + query.step) > 0

    lazy.policy = Rows()
    together = run(lazy, calls)
    assert lazy.stats.decisions_varying_between_samples > 0.3
    for row in range(4):
        alone = run(lazy, [{name: value[row : row + 1] for name, value in one.items()} for one in calls])
        assert_close([output[row : row + 1] for output in together], alone)


def test_gates_read_the_streams_that_enter(compiled: Compiled) -> None:
    lazy = compiled("mmdit", granularity="model")
    (span,) = lazy.branches
    assert span.gate_features == 2 * 32
    assert [output.relative_to for output in span.outputs] == [span.entries[0].name]
    knots = torch.linspace(999, 0, STEPS, dtype=torch.float64)
    table = GateTable((64,), knots, torch.zeros(STEPS, 64), torch.full((STEPS, 1), -1.0))
    lazy.policy = Learned(table)
    run(lazy, trajectory(TOYS["mmdit"], 2, steps=STEPS))
    assert lazy.stats.lazy_ratio == (STEPS - 1) / STEPS


def test_the_first_block_can_stay_outside_as_the_probe(compiled: Compiled) -> None:
    lazy = compiled("dit", granularity="model", probe="first_block")
    (span,) = lazy.branches
    assert span.name == "blocks.1"
    assert torch.equal(*run(lazy, [call(TOYS["dit"])]), *run(lazy.original, [call(TOYS["dit"])]))
    (whole,) = compiled("dit", granularity="model").branches
    assert span.macs < 0.6 * whole.macs
    with pytest.raises(ConfigError, match="probe='first_block' needs spans"):
        lazy_compile.LazyConfig(probe="first_block")


def test_another_granularity_is_another_graph(compiled: Compiled) -> None:
    lazy = compiled("dit", granularity="model")
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 1))
    run(lazy, [call(TOYS["dit"])])
    lazy.lazy_config = lazy_compile.LazyConfig(granularity="block")
    assert len(lazy.branches) == 2
    with pytest.raises(ConfigError, match="1 branches"):
        lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 1))
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    run(lazy, trajectory(TOYS["dit"], steps=STEPS))
    assert lazy.stats.lazy_ratio == 0.5


def test_what_a_reuse_leaves_is_next_to_nothing(compiled: Compiled) -> None:
    ratios = []
    for granularity in ("branch", "model"):
        lazy = compiled("dit", granularity=granularity)
        lazy.policy = Scheduled(CacheSchedule.every(STEPS, STEPS, len(lazy.branches)))
        run(lazy, trajectory(TOYS["dit"], steps=STEPS))
        ratios.append((lazy.expected_cache_bytes, lazy.stats.compute_ratio))
    (of_branches, more), (of_span, less) = ratios
    assert of_span == of_branches / 4
    assert less < more


def test_spans_that_a_model_does_not_have_are_warned_of(compiled: Compiled, caplog: pytest.LogCaptureFixture) -> None:
    lazy = compiled("dit", granularity=9)
    assert len(lazy.branches) == 4
    assert "TinyDiT, granularity=9: 4 spans instead of 9: there are no more cuts" in caplog.text


@pytest.mark.parametrize("granularity", [0, True, "blocks", 1.5])
def test_an_unknown_granularity_is_refused(granularity: object) -> None:
    with pytest.raises(ConfigError, match="expected 'branch', 'block', 'model', or a number of spans"):
        lazy_compile.LazyConfig(granularity=granularity)
    with pytest.raises(ConfigError, match="order is 4; expected 1 to 3"):
        lazy_compile.LazyConfig(order=4)


def test_a_schedule_of_spans_fits_no_branches(compiled: Compiled) -> None:
    lazy = compiled("dit", granularity="model")
    with pytest.raises(ConfigError):
        lazy.policy = Scheduled(CacheSchedule(np.ones((STEPS, 4), dtype=bool)))
