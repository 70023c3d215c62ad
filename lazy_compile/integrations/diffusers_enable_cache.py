"""diffusers' own ``enable_cache`` takes a :class:`LazyCacheConfig`, or a ``LazyConfig``, as one of its configurations.

>>> from lazy_compile import LazyCacheConfig                            # registers it with diffusers  # doctest: +SKIP
>>> pipe.transformer.enable_cache(LazyCacheConfig(policy="fast"))                                      # doctest: +SKIP
>>> pipe.transformer.lazy.stats.lazy_ratio                              # after a sample               # doctest: +SKIP
>>> pipe.transformer.disable_cache()                                                                   # doctest: +SKIP

Importing this module replaces two methods of diffusers' ``CacheMixin``; what is no configuration of lazy_compile
goes on to the originals.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, fields
from typing import Any

from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError, import_optional
from lazy_compile.integrations.diffusers_cache import apply_lazy_cache
from lazy_compile.policies.presets import PolicyLike


@dataclass(frozen=True)
class LazyCacheConfig(LazyConfig):
    """Options of a transformation with the rule to follow, for ``model.enable_cache(...)``.

    Attributes:
        policy: which branches compute; a preset acts at once, for any model and number of steps.
    """

    policy: PolicyLike = "balanced"


def _register(mixin: Any) -> None:
    enable_other, disable_other = mixin.enable_cache, mixin.disable_cache

    @functools.wraps(enable_other)
    def enable_cache(self: Any, config: Any) -> None:
        if not isinstance(config, LazyConfig):
            if isinstance(self._cache_config, LazyConfig):
                raise ConfigError("this model is lazy; disable_cache() comes before another enable_cache()")
            enable_other(self, config)
            return
        if self.is_cache_enabled:
            raise ConfigError(
                f"{type(self._cache_config).__name__} is enabled for this {type(self).__name__}; "
                "use disable_cache() first"
            )
        policy = config.policy if isinstance(config, LazyCacheConfig) else LazyCacheConfig.policy
        plain = LazyConfig(**{item.name: getattr(config, item.name) for item in fields(LazyConfig)})
        lazy = apply_lazy_cache(self, plain, policy=policy)
        self._cache_config = config
        print(f"lazy_compile: {type(self).__name__}: {lazy.policy.describe()}", file=sys.stderr)

    @functools.wraps(disable_other)
    def disable_cache(self: Any) -> None:
        if isinstance(self._cache_config, LazyConfig):
            self.disable_lazy_cache()
            self._cache_config = None
        else:
            disable_other(self)

    mixin.enable_cache, mixin.disable_cache = enable_cache, disable_cache


CacheMixin = import_optional("diffusers.models.cache_utils", "diffusers").CacheMixin
_register(CacheMixin)
