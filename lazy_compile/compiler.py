"""The front door: from a model to its lazy form and back. The one place that states the order of the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lazy_compile.artifact import read
from lazy_compile.config import LazyConfig
from lazy_compile.errors import CaptureError, ConfigError
from lazy_compile.module import LazyModule
from lazy_compile.pass_manager import PassManager
from lazy_compile.passes.canonicalize import Canonicalize
from lazy_compile.passes.discover_branches import DiscoverBranches
from lazy_compile.passes.hoist_step_invariants import HoistStepInvariants
from lazy_compile.passes.insert_gates import InsertGates
from lazy_compile.passes.join_slices import JoinSlices
from lazy_compile.passes.merge_repeats import MergeRepeats
from lazy_compile.passes.outline_branches import OutlineBranches

ModelT = TypeVar("ModelT", bound=nn.Module)


def gating_pipeline(config: LazyConfig) -> PassManager:
    """From a captured program to a gated one."""
    return PassManager(
        [
            Canonicalize(),
            JoinSlices(),
            MergeRepeats(),
            HoistStepInvariants(),
            DiscoverBranches(conv_branches=config.conv_branches),
            OutlineBranches(),
            InsertGates(),
        ]
    )


def transform(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    config: LazyConfig | None = None,
    **options: Any,
) -> LazyModule:
    """Make a diffusion transformer lazy.

    Args:
        model: any denoiser. It is not modified, and its parameters are shared.
        example_inputs: arguments of one call, by name or by position, to capture with now. None captures at the first
            call. Shapes, dtypes and devices matter; values do not.
        config: all options; or give them by name: ``transform(model, reuse="last")``.

    Raises:
        ConfigError: the model or an option is not of the expected kind.
        CaptureError: the model cannot be turned into a graph.
        NoBranchError: nothing in it can be gated.
    """
    if isinstance(model, LazyModule):
        raise ConfigError("this model is lazy already; use restore() to get the original back")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"transform() takes a torch.nn.Module or a diffusers pipeline; seen {type(model).__name__}")
    _refuse_quantisers(model)
    chosen = chosen_config(config, options)
    lazy = LazyModule(model, chosen, gating_pipeline(chosen))
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


def chosen_config(config: LazyConfig | None, options: Mapping[str, Any]) -> LazyConfig:
    """The one given, or made of options by name.

    Raises:
        ConfigError: both are given, or one is not of the expected form.
    """
    if config is not None and not isinstance(config, LazyConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected LazyConfig(...), or give options by name")
    if config is not None and options:
        raise ConfigError(f"give either config or options by name, not both; seen both config and {', '.join(options)}")
    return config or LazyConfig.from_dict(dict(options))


def load(
    directory: str | Path, model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None
) -> LazyModule:
    """Make ``model`` lazy again, with the options, policy and gates that :meth:`LazyModule.save` wrote.

    Raises:
        ArtifactError: the folder is damaged, or was made for another model.
    """
    artifact = read(directory)
    lazy = transform(model, config=artifact.config)
    artifact.check_model(model)
    _capture_example(lazy, example_inputs)
    if example_inputs is not None:
        artifact.check_branches(lazy.branches)
    lazy.policy = artifact.policy
    return lazy


def restore(lazy: LazyModule) -> nn.Module:
    """The original model, untouched."""
    if not isinstance(lazy, LazyModule):
        raise ConfigError(f"restore() takes what transform() returned; seen {type(lazy).__name__}")
    return lazy.release()


def _capture_example(lazy: LazyModule, example_inputs: Mapping[str, Any] | Sequence[Any] | None) -> None:
    if isinstance(example_inputs, Mapping):
        lazy.capture(**example_inputs)
    elif isinstance(example_inputs, list | tuple):
        lazy.capture(*example_inputs)
    elif example_inputs is not None:
        raise ConfigError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a dictionary of arguments, or a tuple"
        )
