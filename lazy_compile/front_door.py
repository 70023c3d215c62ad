"""The public functions, for whatever they are given: a model, or a diffusers pipeline that holds some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import nn

from lazy_compile import compiler
from lazy_compile.config import LazyConfig
from lazy_compile.errors import ConfigError
from lazy_compile.integrations import diffusers_pipeline as pipelines
from lazy_compile.module import LazyModule

Example = Mapping[str, Any] | Sequence[Any] | None


@overload
def transform(
    model: nn.Module, example_inputs: Example = None, config: LazyConfig | None = None, **options: Any
) -> LazyModule: ...
@overload
def transform(
    model: Any,
    example_inputs: None = None,
    config: LazyConfig | None = None,
    *,
    components: Sequence[str] | None = None,
    **options: Any,
) -> Any: ...
def transform(
    model: Any,
    example_inputs: Example = None,
    config: LazyConfig | None = None,
    *,
    components: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Make a diffusion transformer lazy, or the denoisers of a diffusers pipeline.

    Args:
        model: any denoiser: it is not modified, and a lazy model that shares its parameters is returned. Or a pipeline:
            its denoisers are replaced in place, and it is returned.
        example_inputs: arguments of one call, by name or by position, to capture with now. None captures at the first
            call. Shapes, dtypes and devices matter; values do not.
        config: all options; or give them by name: ``transform(model, reuse="last")``.
        components: which models of a pipeline, by name. None takes its transformers and U-Nets.

    Raises:
        ConfigError: the model or an option is not of the expected kind.
        CaptureError: the model cannot be turned into a graph.
        NoBranchError: nothing in it can be gated.
    """
    if not pipelines.is_pipeline(model):
        if components is not None:
            raise ConfigError(f"components names models of a pipeline; seen {type(model).__name__}, which is none")
        return compiler.transform(model, example_inputs, config, **options)
    if example_inputs is not None:
        raise ConfigError("a pipeline needs no example_inputs: its denoisers capture at their first call; leave it out")
    return pipelines.transform_pipeline(model, compiler.chosen_config(config, options), components)


def restore(lazy: Any) -> Any:
    """The original model, untouched; or the pipeline, with its original models back in place."""
    return pipelines.restore_pipeline(lazy) if pipelines.is_pipeline(lazy) else compiler.restore(lazy)


def load(directory: str | Path, model: Any, example_inputs: Example = None) -> Any:
    """Make a model lazy again, with the options, policy and gates that ``save`` wrote; or the denoisers of a pipeline,
    with those that ``save_pretrained`` of a lazy pipeline wrote beside the weights.

    Raises:
        ArtifactError: the folder is damaged, or was made for another model.
    """
    if pipelines.is_pipeline(model):
        return pipelines.load_pipeline(directory, model)
    return compiler.load(directory, model, example_inputs)
