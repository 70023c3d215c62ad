"""Models that no way of capturing serves: something moves, unpacks or replaces their tensors while they run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from lazy_compile.errors import CaptureError


def require_capturable(model: nn.Module) -> None:
    """Refuse before anything is touched. Nothing is imported: what is not there is known by its name.

    Raises:
        CaptureError: the weights are sharded, offloaded layer by layer, or packed; or another cache is active.
    """
    reason = _packed_weights(model) or _offloading(model) or _foreign_cache(model) or _shards(model)
    if reason:
        raise CaptureError(reason)


def _shards(model: nn.Module) -> str:
    """A graph calls no module, so that the hooks that gather a shard would never run."""
    for name, parameter in model.named_parameters():
        if _is_shard(parameter):
            return (
                f"the weights of {type(model).__name__} are sharded ({name} is a {type(parameter).__name__}), and a "
                "lazy model needs them whole; give each process a copy of its own instead of fully_shard"
            )
    return ""


def _is_shard(parameter: nn.Parameter) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return (module is not None and isinstance(parameter, module.DTensor)) or hasattr(parameter, "_is_flat_param")


def _packed_weights(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        kinds = {kind.__name__ for kind in type(parameter).__mro__}
        for kind, (library, advice) in _PACKED.items():
            if kind in kinds:
                return (
                    f"the weights of {type(model).__name__} are packed by {library} ({name} is a {kind}), which "
                    f"torch.export cannot unpack; {advice}"
                )
    return ""


_DEQUANTIZE = "call dequantize() on the model first, or load it without that quantization"
_PACKED = {
    "GGUFParameter": ("GGUF", _DEQUANTIZE),
    "Params4bit": ("bitsandbytes", _DEQUANTIZE),
    "Int8Params": ("bitsandbytes", _DEQUANTIZE),
}


def _offloading(model: nn.Module) -> str:
    hooks = set(_hooks(model))
    if "layerwise_casting" in hooks:
        return (
            f"the weights of {type(model).__name__} are stored in 8 bits and cast while it runs (layerwise casting), "
            "which a graph cannot follow; load the model without enable_layerwise_casting()"
        )
    if "group_offloading" in hooks or any(map(_is_offloaded, model.modules())):
        return (
            f"the weights of {type(model).__name__} come and go layer by layer (sequential or group offload), and a "
            "lazy model needs them in place for a whole call; use enable_model_cpu_offload()"
        )
    return ""


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))


def _foreign_cache(model: nn.Module) -> str:
    named = sorted({_CACHES[hook] for hook in _hooks(model) if hook in _CACHES})
    if named or getattr(model, "is_cache_enabled", False) is True:
        return (
            f"{type(model).__name__} has a cache of diffusers already ({', '.join(named) or 'enable_cache'}), which "
            "decides while the model runs; call disable_cache() on it first"
        )
    if getattr(model, "_is_cached", False) is True:
        return (
            f"{type(model).__name__} has a cache of cache-dit already, which decides while the model runs; call "
            "cache_dit.disable_cache() on it first"
        )
    return ""


_CACHES = {
    "faster_cache_denoiser": "FasterCache",
    "faster_cache_block": "FasterCache",
    "fbc_leader_block_hook": "FirstBlockCache",
    "fbc_block_hook": "FirstBlockCache",
    "mag_cache_leader_block_hook": "MagCache",
    "mag_cache_block_hook": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache_root": "SeaCache",
    "sea_cache_leader_block": "SeaCache",
    "sea_cache_block": "SeaCache",
    "sea_cache_post_norm": "SeaCache",
    "taylorseer_cache": "TaylorSeer",
    "text_kv_cache_transformer": "TextKVCache",
    "text_kv_cache_block": "TextKVCache",
}
"""The names under which diffusers registers the hooks of its caches."""


def _hooks(model: nn.Module) -> Iterator[str]:
    """The names in diffusers' hook registries."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        yield from getattr(registry, "hooks", ())
