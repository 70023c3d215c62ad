"""The front door: from a model or a diffusers pipeline to its lazy form, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import nn

from lazy_compile.config import LazyConfig, chosen_config
from lazy_compile.errors import CaptureError, ConfigError
from lazy_compile.integrations import diffusers_pipeline
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.presets import PolicyLike, as_policy
from lazy_compile.runtime.artifact import read
from lazy_compile.runtime.module import LazyModule

Example = Mapping[str, Any] | Sequence[Any] | None


@overload
def transform(
    model: nn.Module,
    example_inputs: Example = None,
    config: LazyConfig | None = None,
    *,
    policy: PolicyLike | None = None,
    capture_cache: str | Path | None = None,
    **options: Any,
) -> LazyModule: ...
@overload
def transform(
    model: Any,
    example_inputs: None = None,
    config: LazyConfig | None = None,
    *,
    policy: PolicyLike | None = None,
    components: Sequence[str] | None = None,
    capture_cache: str | Path | None = None,
    **options: Any,
) -> Any: ...
def transform(
    model: Any,
    example_inputs: Example = None,
    config: LazyConfig | None = None,
    *,
    policy: PolicyLike | None = None,
    components: Sequence[str] | None = None,
    capture_cache: str | Path | None = None,
    **options: Any,
) -> Any:
    """Make a diffusion transformer lazy, or the denoisers of a diffusers pipeline.

    Args:
        model: any denoiser: it is not modified, and a lazy model that shares its parameters is returned. Or a pipeline:
            its denoisers are replaced in place, and it is returned.
        example_inputs: arguments of one call, by name or by position, to capture with now. None captures at the first
            call. Shapes, dtypes and devices matter; values do not.
        config: all options; or give them by name: ``transform(model, reuse="last")``.
        policy: the rule that decides which branches compute: a :class:`Policy`, a :class:`CacheSchedule`, or the name
            of a preset, which acts at once for any model: ``"quality"``, ``"balanced"`` or ``"fast"``, see
            :data:`lazy_compile.policies.presets.PRESETS`. None computes everything until ``policy`` is set.
        components: which models of a pipeline, by name. None takes its transformers and U-Nets.
        capture_cache: a folder in which captures are kept, so that another process starts without one. It may be
            deleted at any time. None takes the one that the environment variable ``LAZY_COMPILE_CACHE_DIR`` names, if
            any.

    Raises:
        ConfigError: the model or an option is not of the expected kind, or the policy was made for another model.
        CaptureError: the model cannot be turned into a graph.
        NoBranchError: nothing in it can be gated.
    """
    chosen = None if policy is None else as_policy(policy)
    if not diffusers_pipeline.is_pipeline(model):
        if components is not None:
            raise ConfigError(f"components names models of a pipeline; seen {type(model).__name__}, which is none")
        return _transform_model(model, example_inputs, chosen_config(config, options), chosen, capture_cache)
    if example_inputs is not None:
        raise ConfigError(
            "a pipeline takes no example_inputs: leave it out and call the pipeline once, which captures its denoisers"
        )
    return diffusers_pipeline.transform_pipeline(
        model, chosen_config(config, options), components, chosen, capture_cache
    )


def load(
    directory: str | Path,
    model: Any,
    example_inputs: Example = None,
    *,
    verify: bool = True,
    capture_cache: str | Path | None = None,
) -> Any:
    """Make a model lazy again, with the options, policy and gates that ``save`` wrote; or the denoisers of a pipeline,
    with those that ``save_pretrained`` of a lazy pipeline wrote beside the weights.

    Args:
        directory: the folder.
        model: the model that it was made for.
        example_inputs: captures now, see :func:`transform`.
        verify: False reads the files without holding them against their digests.
        capture_cache: a folder in which captures are kept, see :func:`transform`.

    Raises:
        ArtifactError: the folder is damaged, or was made for another model.
    """
    if diffusers_pipeline.is_pipeline(model):
        return diffusers_pipeline.load_pipeline(directory, model, verify=verify, capture_cache=capture_cache)
    artifact = read(directory, verify=verify)
    lazy = _transform_model(model, None, artifact.config, capture_cache=capture_cache)
    artifact.check_model(model)
    _capture_example(lazy, example_inputs)
    if example_inputs is not None:
        artifact.check_branches(lazy.branches)
    lazy.policy = artifact.policy
    return lazy


def restore(lazy: Any) -> Any:
    """The original model, untouched; or the pipeline, with its original models back in place."""
    if diffusers_pipeline.is_pipeline(lazy):
        return diffusers_pipeline.restore_pipeline(lazy)
    if not isinstance(lazy, LazyModule):
        raise ConfigError(f"restore() takes what transform() returned; seen {type(lazy).__name__}")
    return lazy.release()


def _transform_model(
    model: nn.Module,
    example_inputs: Example,
    config: LazyConfig,
    policy: Policy | None = None,
    capture_cache: str | Path | None = None,
) -> LazyModule:
    if isinstance(model, LazyModule):
        raise ConfigError("this model is lazy already; use restore() to get the original back")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"transform() takes a torch.nn.Module or a diffusers pipeline; seen {type(model).__name__}")
    _refuse_quantisers(model)
    lazy = LazyModule(model, config)
    if capture_cache is not None:
        lazy.capture_cache = capture_cache
    if policy is not None:
        lazy.policy = policy
    _capture_example(lazy, example_inputs)
    return lazy


def _refuse_quantisers(model: nn.Module) -> None:
    """ModelOpt's quantisers are a dozen operators each, in which no engine sees a quantised product."""
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("modelopt.")}
        if "TensorQuantizer" in kinds and module.is_enabled:
            raise CaptureError(
                f"the quantisers of {type(model).__name__} are ModelOpt's: import "
                'lazy_compile.integrations.modelopt and use mto.apply_mode(model, [("lazy_compile", {})]) instead of '
                "transform(model)"
            )


def _capture_example(lazy: LazyModule, example_inputs: Example) -> None:
    if isinstance(example_inputs, Mapping):
        lazy.capture(**example_inputs)
    elif isinstance(example_inputs, list | tuple):
        lazy.capture(*example_inputs)
    elif example_inputs is not None:
        raise ConfigError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a dictionary of arguments, or a tuple"
        )
