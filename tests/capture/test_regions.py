from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lazy_compile.capture import capture_model, export_mode
from lazy_compile.capture.alike_modules import are_alike, groups_of_alike
from lazy_compile.capture.captured import Capture
from lazy_compile.capture.regions import Regions
from lazy_compile.ir.program import Program, module_state
from support import repeated
from support.captures import captured_call
from support.layers import WIDTH
from support.repeated import Block, Changes, Stack
from support.slow import slow_but
from support.toy_models import randomize


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Capture]:
    """Captures a model without copying anything."""

    def capture(model: nn.Module, **arguments: Any) -> Capture:
        with monkeypatch.context() as patch:
            patch.setattr(capture_model.Regions, "of", classmethod(lambda cls, model: Regions(model)))
            return captured_call(model, **arguments)

    return capture


def example(tokens: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, tokens, 8, generator=generator), "t": torch.tensor([400.0, 700.0])}


def answer(found: Capture, model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return found.program.graph_module(*found.program.bind(module_state(model), list(arguments.values())))[0]


def value_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return str([value_text(item) for item in value]) if isinstance(value, list | tuple) else str(value)


def described(program: Program) -> list[tuple[Any, ...]]:
    """All there is to a graph but how its nodes are called."""
    number = {node: position for position, node in enumerate(program.graph.nodes)}
    return [
        (
            node.op, str(node.target), str(fx.map_arg((node.args, node.kwargs), number.__getitem__)),
            value_text(node.meta.get("val")), node.meta["module_path"], node.meta.get("nn_module_stack"),
            _lines(node), sorted(node.meta),
        )
        for node in program.graph.nodes
    ]  # fmt: skip


def _lines(node: fx.Node) -> str:
    """Of the model's own code; torch writes some of its own."""
    lines = node.meta.get("stack_trace") or ""
    return "" if "eval_with_key" in lines else lines


def require_equal(found: Capture, whole: Capture) -> None:
    assert found.program.inputs == whole.program.inputs
    assert list(found.program.constants) == list(whole.program.constants)
    for one, other in zip(described(found.program), described(whole.program), strict=True):
        assert one == other
    assert (found.strategy, found.attempts, found.output_spec) == (whole.strategy, whole.attempts, whole.output_spec)
    assert (found.fixing_lines, found.specialised_size) == (whole.fixing_lines, whole.specialised_size)
    assert found.guards == whole.guards


# Graphs that are copied -------------------------------------------------------------------------------------------

COPIED = {
    "a stack": (Stack, 2),
    "blocks that are given sizes and return parts of a tensor": (repeated.InParts, 3),
    "long skips": (repeated.LongSkips, 3),
    "buffers of one shape": (lambda: Stack(repeated.WithTable), 2),
    "a stack that runs twice": (repeated.Looped, 2),
    "every second block without gradients": (lambda: repeated.Detached(depth=6), 0),  # captured one by one
    "blocks in two precisions": (lambda: Stack(repeated.Autocast), 2),
    "blocks that draw random numbers": (lambda: Stack(repeated.Draws), 2),
}
FEW = 2
"""Of them in every run."""


@pytest.mark.parametrize("name", slow_but(list(COPIED)[:FEW], COPIED))
def test_the_graph_is_that_of_a_whole_export(name: str, one_by_one: Callable[..., Capture]) -> None:
    build, copies = COPIED[name]
    model = randomize(build()).eval()
    found = captured_call(model, **example())
    assert found.copies == copies
    require_equal(found, one_by_one(model, **example()))
    with torch.no_grad():
        for arguments in (example(), example(10, seed=1)):
            assert found.accepts(list(arguments.values()))
            torch.manual_seed(0)
            expected = model(**arguments)
            torch.manual_seed(0)
            assert torch.equal(answer(found, model, arguments), expected)


def test_what_is_copied_can_be_trained() -> None:
    model = randomize(Stack()).eval()
    found = captured_call(model, **example())
    weight = model.blocks[3].mlp.up.weight
    expected = torch.autograd.grad(model(**example()).square().sum(), weight)[0]
    values = found.program.bind(module_state(model), list(example().values()))
    seen = torch.autograd.grad(found.program.graph_module(*values)[0].square().sum(), weight)[0]
    assert torch.equal(seen, expected)


# Modules that are not alike ---------------------------------------------------------------------------------------

OWN = {
    "a number": (repeated.own_number, repeated.Scaled),
    "a layer index": (repeated.own_index, Block),
    "a hook": (repeated.own_hook, Block),
    "a hook inside": (repeated.own_inner_hook, Block),
    "a forward": (repeated.own_forward, Block),
    "a forward inside": (repeated.own_inner_forward, Block),
    "an epsilon": (repeated.own_eps, Block),
}


@pytest.mark.parametrize("name", OWN)
def test_blocks_with_something_of_their_own_are_not_alike(name: str) -> None:
    assert groups_of_alike(Stack(OWN[name][1])) == [[f"blocks.{index}" for index in range(4)]]
    assert groups_of_alike(Changes(*OWN[name])) == []


def test_blocks_with_buffers_of_two_shapes_are_of_two_kinds() -> None:
    model = Changes(repeated.longer_table, repeated.WithTable, depth=6)
    assert groups_of_alike(model) == [["blocks.0", "blocks.2", "blocks.4"], ["blocks.1", "blocks.3", "blocks.5"]]


UNLIKE = {
    "a layer index": lambda: Changes(repeated.own_index),
    "a list that grows": repeated.Collects,
    "a list that is written": repeated.Appends,
    "a global that each writes": lambda: repeated.WithGlobals(repeated.ReadsGlobal),
    "a global that the first writes": lambda: repeated.WithGlobals(repeated.FirstWrites),
    "a count of calls": lambda: repeated.WithGlobals(repeated.Counts),
    "a result that is written to": repeated.WritesBehind,
    "an input that is written to": repeated.KeepsInput,
    "a tensor that is kept": repeated.ReadsKept,
    "a failure that is swallowed": repeated.Swallows,
    "a size that is noted in each": repeated.NotesSizes,
    "a constant that each makes": lambda: Stack(repeated.MakesConstant),
    "an activation that all share": repeated.SharesActivation,
}


EVERY_RUN = (
    "a list that is written", "a global that each writes", "a tensor that is kept", "a failure that is swallowed",
    "a constant that each makes",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_but(EVERY_RUN, UNLIKE))
def test_what_is_unlike_is_captured_as_it_is(name: str) -> None:
    """On the meta device, where no result is there to be compared."""
    found = captured_call(UNLIKE[name]().to("meta"), **{key: value.to("meta") for key, value in example().items()})
    assert found.copies == 0
    assert found.strategy == "export, dynamic sizes"
    assert not any("region" in str(node.target) for node in found.program.graph.nodes)


@pytest.mark.parametrize("build", [repeated.WritesBehind, lambda: Stack(repeated.Selects), UNLIKE["a count of calls"]])
def test_nothing_is_left_of_a_capture_that_had_to_be_made_anew(build: Callable[[], nn.Module]) -> None:
    model = randomize(build()).eval()
    with torch.no_grad():
        before = model(**example())
        found = captured_call(model, **example())
        assert found.copies == 0
        assert torch.equal(answer(found, model, example()), before)
        assert torch.equal(model(**example()), before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_long_capture_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(export_mode, "SECONDS_BETWEEN_NEWS", 0.0)
    caplog.set_level(logging.INFO, logger="lazy_compile")
    captured_call(randomize(Stack(depth=1)).eval(), **example())
    said = [record.message for record in caplog.records if record.message.startswith("capturing Stack: ")]
    assert len(said) > 10
    assert re.fullmatch(r"capturing Stack: \d+ operators after \d+ s", said[-1])


# Published models, small ------------------------------------------------------------------------------------------


def diffusers_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import diffusers

    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    configs: dict[str, dict[str, Any]] = {
        "DiTTransformer2DModel": {
            "in_channels": 4, "out_channels": 4, "num_layers": 5, "sample_size": 8, "num_embeds_ada_norm": 10, **heads,
        },
        "FluxTransformer2DModel": {
            "in_channels": 8, "num_layers": 4, "num_single_layers": 5, "joint_attention_dim": 12,
            "guidance_embeds": True, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6), "patch_size": 1, **heads,
        },
        "WanTransformer3DModel": {
            "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 4,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "patch_size": (1, 2, 2),
            "rope_max_seq_len": 32, **heads,
        },
        "SD3Transformer2DModel": {
            "in_channels": 4, "out_channels": 4, "num_layers": 5, "sample_size": 8, "caption_projection_dim": 32,
            "joint_attention_dim": 12, "pooled_projection_dim": 12, "patch_size": 2, **heads,
        },
    }  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    calls: dict[str, dict[str, Any]] = {
        "DiTTransformer2DModel": {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])},
        "FluxTransformer2DModel": {
            "hidden_states": torch.randn(2, 16, 8), "pooled_projections": torch.randn(2, 12), "guidance": torch.ones(2),
            "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3), **text,
        },
        "WanTransformer3DModel": {"hidden_states": torch.randn(2, 4, 3, 8, 8), **text},
        "SD3Transformer2DModel": {
            "hidden_states": torch.randn(2, 4, 8, 8), "pooled_projections": torch.randn(2, 12), **text,
        },
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(diffusers, name)(**configs[name])
    return randomize(model).eval(), {**calls[name], "timestep": torch.tensor([5, 5]), "return_dict": False}


COPIES_OF_PUBLISHED = {
    "DiTTransformer2DModel": 2,
    "FluxTransformer2DModel": 4,
    "WanTransformer3DModel": 2,
    "SD3Transformer2DModel": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES_OF_PUBLISHED)
def test_published_models_have_the_graph_of_a_whole_export(name: str, one_by_one: Callable[..., Capture]) -> None:
    model, arguments = diffusers_model(name)
    found = captured_call(model, **arguments)
    assert found.copies == COPIES_OF_PUBLISHED[name]
    require_equal(found, one_by_one(model, **arguments))


# Likeness ---------------------------------------------------------------------------------------------------------


def test_the_outermost_alike_modules_are_found_in_lists() -> None:
    model = nn.Module()
    model.down = nn.ModuleList(Stack(depth=3) for _ in range(2))
    model.up = nn.Sequential(*(Block() for _ in range(4)))
    model.few = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    own_index = repeated.own_index
    for number, stack in enumerate(model.down):
        own_index(number, stack)
    assert groups_of_alike(model) == [
        [f"up.{index}" for index in range(4)],
        [f"down.{stack}.blocks.{index}" for stack in range(2) for index in range(3)],
    ]


class Processor:
    def __init__(self, scale: float) -> None:
        self.scale, self.kept = scale, {"key": [1, 2.0]}


class Slotted:
    __slots__ = ("scale",)


def test_attributes_are_compared_by_what_they_hold() -> None:
    def pair(one: Any, other: Any) -> bool:
        blocks = Block(), Block()
        blocks[0].held, blocks[1].held = one, other
        return are_alike(*blocks)

    shared = nn.Linear(4, 4)
    assert pair(Processor(1.0), Processor(1.0))
    assert not pair(Processor(1.0), Processor(2.0))
    assert not pair(1, 1.0)
    assert not pair(True, 1)
    assert pair(float("nan"), float("nan"))
    assert not pair(Slotted(), Slotted())
    assert not pair(torch.ones(2), torch.ones(2))
    assert pair(shared, shared)
    assert not pair(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    assert not pair(lambda: 1, lambda: 1)
    assert pair(torch.relu, torch.relu)


def test_weights_that_are_one_and_the_same_are_so_in_both() -> None:
    one, other = Block(), Block()
    one.tied = one.mlp.up.weight
    other.tied = nn.Parameter(torch.ones(2 * WIDTH, WIDTH))
    assert not are_alike(one, other)
    other.tied = other.mlp.up.weight
    assert are_alike(one, other)


def test_a_module_in_training_is_not_like_one_in_evaluation() -> None:
    one, other = Block(), Block().eval()
    assert not are_alike(one, other)
