"""Models that are refused before anything is touched, and that every refusal leaves a model as it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lazy_compile
from lazy_compile.capture.refusals import require_capturable
from lazy_compile.errors import LazyCompileError
from support.expert_models import Denoiser, NoisyMLP, Outermost, WritingMLP
from support.layers import MLP
from support.slow import slow_but
from support.small_model import SMALL, Small
from support.toy_models import REFUSED, Toy, call, randomize

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def refusal(model: nn.Module, arguments: dict[str, Any]) -> str:
    """The one line that a model is refused with; the model is checked to be as it was."""
    before = described(model)
    with pytest.raises(LazyCompileError) as caught:
        lazy_compile.transform(model, arguments)
    assert described(model) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def described(model: nn.Module) -> list[Any]:
    """Where each tensor lies, what it holds, and what hangs on each module."""
    state = [*model.named_parameters(), *model.named_buffers()]
    tensors = [
        (name, id(value), value.device, value.dtype, value.data_ptr(), value.requires_grad, value.grad is None)
        for name, value in state
    ]
    values = [value.detach().double().sum().item() if not value.is_meta else None for _, value in state]
    modules = [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ]
    return [tensors, values, modules]


# Diffusers' hooks -------------------------------------------------------------------------------------------------


def wan() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=16,
    ).eval()  # fmt: skip
    arguments = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "return_dict": False,
    }
    return model, arguments


def by_leaves(model: Any) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def by_blocks(model: Any) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [by_leaves, by_blocks])
def test_offloaded_weights_stay_where_they_are(offload: Callable[[Any], None]) -> None:
    """By leaves too: Wan's blocks hold a table of their own, which comes and goes with the block."""
    model, arguments = wan()
    with torch.no_grad():
        (dense,) = model(**arguments)
    offload(model)
    assert "come and go with whole parts of it (" in refusal(model, arguments)
    with torch.no_grad():
        assert torch.equal(model(**arguments)[0], dense)


CACHES = [
    diffusers.FirstBlockCacheConfig(threshold=0.1),
    diffusers.TaylorSeerCacheConfig(),
    diffusers.MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4),
    diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500),
]


@pytest.mark.parametrize("config", CACHES, ids=lambda config: type(config).__name__)
def test_a_cache_of_diffusers_has_to_go_first(config: Any) -> None:
    model, arguments = wan()
    model.enable_cache(config)
    text = refusal(model, arguments)
    assert text.startswith("WanTransformer3DModel has a cache of diffusers already (")
    assert text.endswith("; call disable_cache() on it first")
    model.disable_cache()
    require_capturable(model)


def test_a_cache_of_cache_dit_has_to_go_first() -> None:
    model = SMALL.model()
    model._is_cached = True
    assert "has a cache of cache-dit already" in refusal(model, call(SMALL))


def test_weights_that_are_fetched_ahead_are_refused() -> None:
    model = SMALL.model()
    group = SimpleNamespace(group=SimpleNamespace(stream=object()))
    model.mlp.up._diffusers_hook = SimpleNamespace(hooks={"group_offloading": group})
    assert "are fetched ahead, in the order in which its layers run" in refusal(model, call(SMALL))


def test_packed_weights_without_values_are_named() -> None:
    model = SMALL.model().to("meta")
    packed = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn"})
    model.mlp.up.weight = packed(torch.zeros(4, 4, device="meta"), requires_grad=False)
    arguments = {name: value.to("meta") for name, value in call(SMALL).items()}
    assert refusal(model, arguments) == (
        "Small calls mlp.up as it is, since its weight is packed by bitsandbytes (Params4bit), and there is nothing to "
        "call it with on the meta device; load its weights first"
    )


def test_weights_that_accelerate_moves_in_whole_parts_are_refused() -> None:
    model = SMALL.model()
    model.mlp._hf_hook = SimpleNamespace(offload=True)
    assert "come and go with whole parts of it (mlp)" in refusal(model, call(SMALL))


# Whatever the reason ----------------------------------------------------------------------------------------------


class MovesItsWeights(Small):
    """Exchanges the memory and the flags of its weights, and decides by what it computes."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(False)
        self.calls = getattr(self, "calls", 0) + 1
        self.attn.train()
        result = super().forward(x, t)
        return result if result.mean() > 0 else -result


REFUSALS: dict[str, tuple[Callable[[], nn.Module], Toy]] = {
    **{name: (toy.model, toy) for name, toy in REFUSED.items()},
    "moves_its_weights": (lambda: randomize(MovesItsWeights()), SMALL),
    "decides_outermost": (lambda: randomize(Outermost(MLP)).eval(), SMALL),
    "noisy_module": (lambda: randomize(Denoiser(NoisyMLP)).eval(), SMALL),
    "writing_module": (lambda: randomize(Denoiser(WritingMLP)).eval(), SMALL),
}
READS = "it decides by a value that depends on its weights, item() in forward, expert_models.py:"
REASONS = dict.fromkeys(("decides_outermost", "noisy_module", "writing_module"), READS)


@pytest.mark.parametrize(
    ("name", "training"),
    slow_but([*((name, False) for name in REFUSALS), ("plain", True)], product(sorted(REFUSALS), (False, True))),
)
def test_a_refused_model_runs_as_before(name: str, training: bool) -> None:
    build, toy = REFUSALS[name]
    model, other, arguments = build(), build(), call(toy)
    model.train(training)
    with torch.no_grad():
        torch.manual_seed(0)
        dense = pytree.tree_leaves(other(**arguments))
    text = refusal(model, arguments)
    assert name not in REASONS or REASONS[name] in text
    with torch.no_grad():
        torch.manual_seed(0)
        after = pytree.tree_leaves(model.eval()(**arguments))
    assert all(torch.equal(a, b) for a, b in zip(after, dense, strict=True))
