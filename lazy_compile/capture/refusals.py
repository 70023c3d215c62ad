"""Models and modules whose tensors something moves, unpacks or replaces while they run: no graph reads those."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lazy_compile.errors import CaptureError
from lazy_compile.processes import is_shard


def require_capturable(model: nn.Module) -> None:
    """Refuse before anything is touched. Nothing is imported: what is not there is known by its name.

    Raises:
        CaptureError: the weights are sharded, or offloaded in whole blocks; or another cache is active.
    """
    reason = _offloading(model) or _foreign_cache(model) or _shards(model)
    if reason:
        raise CaptureError(reason)


def _shards(model: nn.Module) -> str:
    """Hooks of a module that contains others gather the weights of all of them; a graph calls no such module."""
    fully_sharded = sys.modules.get("torch.distributed.fsdp")  # without it there are none
    for path, module in model.named_modules():
        if fully_sharded is not None and isinstance(module, fully_sharded.FSDPModule):
            return _needs_whole(model, f"by FSDP, which gathers {path or 'the model'} when it is called")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "_is_flat_param") or (is_shard(parameter) and "." not in name):
            return _needs_whole(model, f"({name} is a {type(parameter).__name__})")
    return ""


def _needs_whole(model: nn.Module, seen: str) -> str:
    return (
        f"the weights of {type(model).__name__} are sharded {seen}, and a graph calls its layers alone; give each "
        "process all weights, or split layers by tensor parallelism (parallelize_module on the original, before or "
        "after transform)"
    )


def eager_modules(model: nn.Module) -> dict[str, str]:
    """Paths of the modules that have to be called as they are, since something unpacks, casts or fetches their weights
    whenever they run, and what that is."""
    found = {}
    for path, module in model.named_modules():
        reason = _packing(module) or _moving(module)
        if reason and path:
            found[path] = reason
    return found


def unreadable(model: nn.Module) -> str:
    """Why a model whose weights hold no values cannot be captured; empty if it can."""
    for path, reason in eager_modules(model).items():
        return (
            f"{type(model).__name__} calls {path} as it is, since {reason}, and there is nothing to call it with on "
            "the meta device; load its weights first"
        )
    return ""


def _packing(module: nn.Module) -> str:
    """A tensor class that a graph cannot take apart."""
    for name, parameter in module._parameters.items():
        kind = type(parameter)
        if is_shard(parameter):
            return f"its {name} is spread over processes (tensor parallelism)"
        if parameter is not None and kind not in _PLAIN and not kind.__module__.startswith(_TAKEN_APART):
            return f"its {name} is packed by {kind.__module__.partition('.')[0]} ({kind.__name__})"
    return ""


_PLAIN = (Tensor, nn.Parameter, UninitializedParameter)
_TAKEN_APART = ("torch.", "torchao.")
"""Packages whose tensor classes torch.export takes apart."""


def _moving(module: nn.Module) -> str:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if "layerwise_casting" in hooks:
        return "its weights are stored in 8 bits and cast while it runs (layerwise casting)"
    if "group_offloading" in hooks or _is_offloaded(module):
        return "its weights come and go while it runs (offload)"
    return ""


def _offloading(model: nn.Module) -> str:
    """Hooks of a module that contains others move weights that a graph reads by itself, or those of all of them."""
    for path, module in model.named_modules():
        if _moving(module) and next(module.children(), None) is not None:
            part = path or "the model itself"
            return (
                f"the weights of {type(model).__name__} come and go with whole parts of it ({part}), and a "
                "lazy model needs them in place for a whole call; use enable_model_cpu_offload()"
            )
        group = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        if group is not None and getattr(group.group, "stream", None) is not None:
            return (
                f"the weights of {type(model).__name__} are fetched ahead, in the order in which its layers run, and a "
                "lazy model leaves some out; use enable_group_offload() without use_stream"
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
