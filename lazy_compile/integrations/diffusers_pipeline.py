"""diffusers pipelines: their denoisers are replaced in place, and the pipeline runs unchanged.

>>> pipe = lazy_compile.transform(pipe, policy="quality")  # doctest: +SKIP
>>> pipe("a lighthouse", num_inference_steps=20)           # doctest: +SKIP
>>> pipe.transformer.stats.lazy_ratio                      # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import ref

from torch import nn

from lazy_compile.config import LazyConfig
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.integrations.followed_scheduler import follow, unfollow
from lazy_compile.policies.policy import Policy
from lazy_compile.runtime.artifact import MANIFEST, read
from lazy_compile.runtime.module import LazyModule

GATES = "lazy"
"""The folder beside a denoiser's weights that holds its gates."""


class _StandsFor(type):
    """A class that equals another one: ``from_pipe`` looks ``type(model)`` up among the classes that it takes."""

    stands_for: type | None = None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls.stands_for is not None and other is cls.stands_for)

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class LazyDenoiser(LazyModule, metaclass=_StandsFor):
    """A lazy model that a diffusers pipeline takes for the original.

    It gives the original's class where one is asked for, so that a pipeline checks, saves, registers and hands it on as
    before. ``cache_context`` keeps apart what a guidance calls once for each condition.
    """

    def __new__(cls, original: nn.Module, config: LazyConfig) -> LazyDenoiser:
        return super().__new__(_standing_for(cast(Any, type(original))))

    def __init__(self, original: nn.Module, config: LazyConfig) -> None:
        super().__init__(original, config)
        self.__dict__["__module__"] = type(original).__module__  # diffusers reads the library's name there
        if save_pretrained := getattr(original, "save_pretrained", None):  # and from its signature what it may pass

            @functools.wraps(save_pretrained)
            def save_with_gates(*args: Any, **kwargs: Any) -> None:
                self._save_with_gates(*args, **kwargs)

            self.__dict__["save_pretrained"] = save_with_gates

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_modules"]["original"])

    @contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """Calls in here belong to the stream ``name``, as diffusers' own caches have it."""
        with ExitStack() as stack:
            stack.enter_context(self.stream(name))
            if inner := getattr(self.original, "cache_context", None):
                stack.enter_context(inner(name, **options))
            yield

    def _graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_captured:
            require_resting_weights(self.original)
        if (scheduler := self._scheduler()) is not None:
            follow(scheduler, self._trajectories)
        return super()._graph_for(args, kwargs)

    def _scheduler(self) -> Any:
        """The one that the pipeline has now; None if there is none, or this is a copy."""
        pipe = self.__dict__.get(_PIPE, lambda: None)()
        return getattr(pipe, "scheduler", None)

    def release(self) -> nn.Module:
        if (scheduler := self._scheduler()) is not None:
            unfollow(scheduler, self._trajectories)
        return super().release()

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (_, *arguments) = super().__reduce__()
        return rebuild, (LazyDenoiser, *arguments)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """A pipeline has come to its end; another one, in a callback or a thread, may go on."""
        self._trajectories.forget_finished()
        if inner := getattr(self.original, "_reset_stateful_cache", None):
            inner(recurse)

    def _save_with_gates(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The original's weights and configuration, and the policy with its gates in a folder ``lazy`` beside them."""
        self.original.save_pretrained(save_directory, *args, **kwargs)  # type: ignore[operator]
        if self._store.graphs:
            self.save(Path(save_directory) / GATES)


_PIPE = "_pipe"


@functools.cache
def _standing_for(original: type) -> type[LazyDenoiser]:
    kind: Any = _StandsFor("LazyDenoiser", (LazyDenoiser,), {"stands_for": original, "__module__": __name__})
    return cast(type[LazyDenoiser], kind)


def is_pipeline(target: object) -> bool:
    """Whether this is a diffusers pipeline; tells without importing diffusers."""
    return any(f"{kind.__module__}.{kind.__name__}" == _PIPELINE for kind in type(target).__mro__)


_PIPELINE = "diffusers.pipelines.pipeline_utils.DiffusionPipeline"
_DENOISERS = ("transformer", "unet")


def transform_pipeline(
    pipe: Any,
    config: LazyConfig,
    components: Sequence[str] | None = None,
    policy: Policy | None = None,
    capture_cache: str | Path | None = None,
) -> Any:
    """Replace the denoisers of a pipeline by lazy ones; each captures at its first call. Returns the pipeline.

    Args:
        pipe: a diffusers pipeline.
        config: options of all its denoisers.
        components: which ones, by name. None takes those that diffusers names ``transformer...`` and ``unet...``.
        policy: the rule that each of them follows; None computes everything.
        capture_cache: the folder in which captures are kept, see :attr:`LazyModule.capture_cache`.

    Raises:
        ConfigError: there is no such component, it is lazy already, or its weights are offloaded by layers.
    """
    modules = {name: item for name, item in pipe.components.items() if isinstance(item, nn.Module)}
    chosen = components or denoiser_names(pipe)
    for name in chosen or ["transformer"]:
        if name not in modules:
            raise ConfigError(
                f"{type(pipe).__name__} has no model {name!r}; its models are {', '.join(modules) or 'none'}: "
                "name its denoisers with components=[...]"
            )
        if isinstance(modules[name], LazyModule):
            raise ConfigError(f"{name} of this {type(pipe).__name__} is lazy already; restore(pipe) gives it back")
        require_resting_weights(modules[name])
    with models_exchanged(pipe):
        for name in chosen:
            lazy = LazyDenoiser(modules[name], config)
            lazy.__dict__[_PIPE] = ref(pipe)
            if capture_cache is not None:
                lazy.capture_cache = capture_cache
            if policy is not None:
                lazy.policy = policy
            setattr(pipe, name, lazy)
    return pipe


def denoiser_names(pipe: Any) -> list[str]:
    """The models of a pipeline that diffusers names ``transformer...`` and ``unet...``."""
    return [
        name for name, item in pipe.components.items() if isinstance(item, nn.Module) and name.startswith(_DENOISERS)
    ]


def require_resting_weights(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: offloading by layers moves the weights while the model runs, so that no graph can hold them.
    """
    inner = [module for module in model.modules() if module is not model]
    if any(hasattr(module, "_hf_hook") for module in inner) or any(map(_is_group_offloaded, inner)):
        raise ConfigError(
            f"the weights of {type(model).__name__} come and go layer by layer (sequential or group offload), and "
            "a lazy model needs them in place for a whole call; use enable_model_cpu_offload()"
        )


def _is_group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


@contextmanager
def models_exchanged(pipe: Any) -> Iterator[None]:
    """Take the hooks of ``enable_model_cpu_offload`` off the old models, and put them on what is there then."""
    offloaded = bool(getattr(pipe, "_all_hooks", None))
    if offloaded:
        pipe.remove_all_hooks()
    try:
        yield
    finally:
        if offloaded:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)


def restore_pipeline(pipe: Any) -> Any:
    """Put the original denoisers back. Returns the pipeline.

    Raises:
        ConfigError: none of them is lazy.
    """
    lazy = lazy_denoisers(pipe)
    if not lazy:
        raise ConfigError(f"no model of this {type(pipe).__name__} is lazy; there is nothing to restore")
    with models_exchanged(pipe):
        for name, denoiser in lazy.items():
            setattr(pipe, name, denoiser.release())
    return pipe


def load_pipeline(
    directory: str | Path, pipe: Any, *, verify: bool = True, capture_cache: str | Path | None = None
) -> Any:
    """Make those denoisers lazy whose gates ``pipe.save_pretrained(directory)`` wrote. Returns the pipeline.

    Raises:
        ArtifactError: the folder holds no gates, or they were made for another model.
    """
    folders = {name: Path(directory) / name / GATES for name in pipe.components}
    artifacts = {name: read(folder, verify=verify) for name, folder in folders.items() if (folder / MANIFEST).exists()}
    if not artifacts:
        raise ArtifactError(
            f"{directory} holds no gates; expected a folder that save_pretrained() of a lazy pipeline wrote, "
            f"with {', '.join(str(Path(name) / GATES) for name in pipe.components if name.startswith(_DENOISERS))}"
        )
    for name, artifact in artifacts.items():
        artifact.check_model(pipe.components[name])
    for name, artifact in artifacts.items():
        transform_pipeline(pipe, artifact.config, [name], artifact.policy, capture_cache)
    return pipe


def lazy_denoisers(pipe: Any) -> dict[str, LazyModule]:
    """The lazy models of a pipeline, by name."""
    return {name: item for name, item in pipe.components.items() if isinstance(item, LazyModule)}
