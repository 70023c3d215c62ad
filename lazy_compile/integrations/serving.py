"""Serving engines: lazy denoisers behind the interfaces that they call their caches by.

- vLLM-Omni 0.30, ``CacheBackend``: ``enable``, ``refresh``, ``is_enabled``, by :class:`LazyCacheBackend`.
- TensorRT-LLM visual_gen, ``CacheAccelerator``: ``wrap``, ``unwrap``, ``refresh``, ``get_stats``, by
  :class:`LazyCacheAccelerator`.
- SGLang-diffusion 0.5: functions ``enable_cache_on_transformer``, ``refresh_context_on_transformer`` and
  ``disable_cache_on_transformer``, of the same names here.

None of the engines is imported: they ask for these methods, not for a class. Written from their public sources; not run
in them, which takes a GPU.

>>> backend = LazyCacheBackend(policy="balanced")  # doctest: +SKIP
>>> backend.enable(pipeline)                       # doctest: +SKIP
>>> backend.refresh(pipeline, 20)                  # doctest: +SKIP
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError
from lazy_compile.integrations.diffusers_cache import apply_lazy_cache
from lazy_compile.policies.presets import PolicyLike
from lazy_compile.runtime.module import LazyModule

logger = logging.getLogger("lazy_compile")

_DENOISERS = ("transformer", "transformer_2", "unet")


class LazyDenoisers:
    """The denoisers of a pipeline, made lazy in place.

    Args:
        policy: as in :func:`lazy_compile.transform`.
        config: options of all denoisers.
        components: attributes of the pipeline. None takes what it says itself (``_dit_modules``), else ``transformer``,
            ``transformer_2`` and ``unet``.
    """

    def __init__(
        self,
        policy: PolicyLike = "balanced",
        config: LazyConfig | None = None,
        components: tuple[str, ...] | None = None,
    ) -> None:
        self.policy, self.config, self.components = policy, config or LazyConfig(), components
        self.lazy: dict[str, LazyModule] = {}
        self._modules: dict[str, nn.Module] = {}

    def apply(self, pipeline: Any) -> None:
        """
        Raises:
            ConfigError: it has no denoiser, or one that is lazy already.
        """
        names = self.components or getattr(pipeline, "_dit_modules", None) or _DENOISERS
        found = {name: getattr(pipeline, name, None) for name in names}
        modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        if not modules:
            raise ConfigError(
                f"{type(pipeline).__name__} has none of {', '.join(names)}; name its denoisers in components"
            )
        for name, module in modules.items():
            self.lazy[name] = apply_lazy_cache(module, self.config, policy=self.policy)
            self._modules[name] = module

    def remove(self) -> None:
        """Give the denoisers their own forward back."""
        for module in self._modules.values():
            module.disable_lazy_cache()  # type: ignore[operator]
        self.lazy, self._modules = {}, {}

    def start(self) -> None:
        """A new batch of requests begins, and no other runs: its statistics are its own, and old caches are freed."""
        for lazy in self.lazy.values():
            lazy.reset()
            lazy.reset_stats()

    def stats(self) -> dict[str, dict[str, float]]:
        """What was reused, and the memory of the caches, for each denoiser that was called."""
        return {
            name: {
                "lazy_ratio": lazy.stats.lazy_ratio,
                "compute_ratio": lazy.stats.compute_ratio,
                "cache_bytes": lazy.cache_bytes,
            }
            for name, lazy in self.lazy.items()
            if lazy.is_captured
        }


class LazyCacheBackend:
    """What vLLM-Omni's ``get_cache_backend`` returns for its other caches; ``install`` makes it return this one.

    Args:
        config: the engine's own ``cache_config``; its options are those of other caches, and are not read.
        policy: as in :func:`lazy_compile.transform`.
        lazy_config: options of all denoisers.
    """

    def __init__(
        self, config: Any = None, *, policy: PolicyLike = "balanced", lazy_config: LazyConfig | None = None
    ) -> None:
        self.config = config
        self.denoisers = LazyDenoisers(policy, lazy_config)

    @property
    def enabled(self) -> bool:
        return bool(self.denoisers.lazy)

    def is_enabled(self) -> bool:
        return self.enabled

    def enable(self, pipeline: Any) -> None:
        """Called once, when the pipeline is there."""
        self.denoisers.apply(pipeline)

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Called before each batch of requests that are sampled together."""
        if verbose and self.denoisers.stats():
            logger.info("lazy_compile: the batch before: %s", self.denoisers.stats())
        self.denoisers.start()

    def disable(self, pipeline: Any = None) -> None:
        self.denoisers.remove()


def install(*modules: Any, name: str = "lazy_compile", **options: Any) -> None:
    """Let ``cache_backend="lazy_compile"`` of vLLM-Omni mean :class:`LazyCacheBackend`, other names what they meant.

    Args:
        modules: those that hold the engine's ``get_cache_backend``: ``vllm_omni.diffusion.cache.selector`` and
            ``vllm_omni.diffusion.worker.diffusion_model_runner``.
        name: of the cache.
        options: of :class:`LazyCacheBackend`.
    """
    for module in modules:
        if not hasattr(module, "get_cache_backend"):
            raise ConfigError(f"{module.__name__} has no get_cache_backend; this was written for vLLM-Omni 0.30")

        def get_cache_backend(cache_backend: Any, cache_config: Any, other: Any = module.get_cache_backend) -> Any:
            chosen = cache_backend == name
            return LazyCacheBackend(cache_config, **options) if chosen else other(cache_backend, cache_config)

        module.get_cache_backend = get_cache_backend


class LazyCacheAccelerator:
    """The ``CacheAccelerator`` of TensorRT-LLM's visual_gen, for one of its pipelines."""

    def __init__(self, pipeline: Any, policy: PolicyLike = "balanced", config: LazyConfig | None = None) -> None:
        self._pipeline = pipeline
        self.denoisers = LazyDenoisers(policy, config)

    def wrap(self, *_: Any, **__: Any) -> None:
        if not self.is_enabled():
            self.denoisers.apply(self._pipeline)

    def unwrap(self) -> None:
        self.denoisers.remove()

    def refresh(self, num_inference_steps: int, **_: Any) -> None:
        self.denoisers.start()

    def get_stats(self) -> dict[str, Any]:
        return self.denoisers.stats()

    def is_enabled(self) -> bool:
        return bool(self.denoisers.lazy)


def enable_cache_on_transformer(transformer: nn.Module, policy: PolicyLike = "balanced", **options: Any) -> nn.Module:
    """SGLang-diffusion: called when its denoising stage meets a transformer; the same object is returned."""
    apply_lazy_cache(transformer, policy=policy, **options)
    return transformer


def refresh_context_on_transformer(transformer: nn.Module, num_inference_steps: int, **_: Any) -> None:
    """SGLang-diffusion: called before each request."""
    lazy: LazyModule = transformer.lazy  # type: ignore[assignment]
    lazy.reset()
    lazy.reset_stats()


def disable_cache_on_transformer(transformer: nn.Module) -> nn.Module:
    """SGLang-diffusion: called when the cache is no longer asked for."""
    transformer.disable_lazy_cache()  # type: ignore[operator]
    return transformer
