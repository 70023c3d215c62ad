"""A front door in the manner of diffusers' ``enable_cache``: the module stays, and its ``forward`` becomes lazy.

>>> lazy_compile.apply_lazy_cache(pipe.transformer, policy="balanced")  # doctest: +SKIP
>>> pipe.transformer.lazy.policy = Scheduled(schedule)                  # doctest: +SKIP
>>> pipe.transformer.disable_lazy_cache()                               # doctest: +SKIP
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lazy_compile.config import LazyConfig, chosen_config
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.diffusers_pipeline import LazyDenoiser
from lazy_compile.policies.presets import PolicyLike
from lazy_compile.runtime.module import LazyModule

_HANDLE = "lazy"
_TAKEN_OVER = ("forward", "cache_context", "_reset_stateful_cache", "save_pretrained")


def apply_lazy_cache(
    module: nn.Module, config: LazyConfig | None = None, *, policy: PolicyLike | None = None, **options: Any
) -> LazyModule:
    """Make a model lazy in place: the same object, called as before.

    Its weights, submodules and hooks are untouched. ``module.lazy`` is the lazy model, with its branches, policy and
    statistics; ``module.disable_lazy_cache()`` undoes everything. It captures at the first call.

    Args:
        module: any denoiser, with or without diffusers' ``cache_context``.
        config: all options; or give them by name.
        policy: as in :func:`lazy_compile.transform`; ``"balanced"``, say, acts at once. None computes everything.

    Returns:
        ``module.lazy``.

    Raises:
        ConfigError: the model is lazy already, or an option is not of the expected kind.
    """
    if isinstance(module, LazyModule) or _HANDLE in vars(module):
        raise ConfigError("this model is lazy already; disable_lazy_cache() or restore() gives the original back")
    if not isinstance(module, nn.Module):
        raise ConfigError(f"apply_lazy_cache() takes a torch.nn.Module; seen {type(module).__name__}")
    chosen = chosen_config(config, options)
    inner = copy.copy(module)  # has the same dictionaries of parameters and submodules, and keeps the dense forward
    lazy = LazyDenoiser(inner, chosen)
    if policy is not None:
        lazy.policy = policy
    own = vars(module)
    before = {name: own[name] for name in _TAKEN_OVER if name in own}

    def disable_lazy_cache() -> None:
        """Give the model its own forward back."""
        for name in (*_TAKEN_OVER, _HANDLE, "disable_lazy_cache"):
            own.pop(name, None)
        own.update(before)

    own.update({name: getattr(lazy, name) for name in _TAKEN_OVER if hasattr(module, name)})
    own[_HANDLE] = lazy  # not by setattr, which would make it a submodule of what it wraps
    own["disable_lazy_cache"] = disable_lazy_cache
    return lazy
