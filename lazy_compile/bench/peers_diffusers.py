"""The caches that diffusers ships, on a bare transformer: its own hooks, each on a fresh copy of the model.

A copy for each trajectory leaves no hook and no state behind. The pipelines of diffusers tell the hooks where the
denoising loop is; a bare model has none, so :class:`HookedModel` says it at every call.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lazy_compile.bench.peer_task import Denoiser, PeerTask, Setting, System, grid
from lazy_compile.errors import import_optional

BLOCKS, MODULES = r"transformer_blocks\.\d+", r"transformer_blocks\.\d+\.(attn|attn1|attn2|ff|ff_context)"
"""What TaylorSeer forecasts: the defaults of diffusers name modules that none of the models has."""

SPLIT_INPUTS = (
    "hidden_states", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "timestep",
    "class_labels",
)  # fmt: skip
"""Inputs whose first half is unguided."""


class HookedModel:
    """A copy of the model with a cache applied, called as a pipeline calls it.

    Attributes:
        timestep: the time input of the running call.
    """

    def __init__(self, task: PeerTask, apply: Callable[[nn.Module, HookedModel], None], unguided_first: bool = False):
        self._task, self._unguided_first = task, unguided_first
        self.timestep, self._step = float("inf"), 0
        self._model = copy.deepcopy(task.subject.model)
        hooks = import_optional("diffusers.hooks", "diffusers").HookRegistry
        apply(self._model, self)
        hooks.check_if_exists_or_initialize(self._model).invalidate_child_registries_cache()

    def __call__(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor]:
        inner = import_optional("diffusers.hooks.hooks", "diffusers")
        self.timestep = float(inputs["timestep"][0])
        where = inner.CacheContext(
            "batch", step_index=self._step, num_inference_steps=self._task.steps, timestep=self.timestep,
            sigma=self._task.subject.sigma(self.timestep),
        )  # fmt: skip
        inner._set_cache_context(self._model, where)  # cache_context() of CacheMixin, which not every model inherits
        self._step += 1
        inputs["hidden_states"] = hidden_states
        if not self._unguided_first:
            return (self._model(**inputs)[0],)
        turned = {name: _halves_turned(value) for name, value in inputs.items()}
        return (_halves_turned(self._model(**turned)[0]),)


def _halves_turned(value: Any) -> Any:
    return torch.cat(value.chunk(2)[::-1]) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of diffusers: one says at every use that FasterCache is experimental."""
    logging = import_optional("diffusers.utils.logging", "diffusers")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _hooked(task: PeerTask, name: str, config: Any) -> HookedModel:
    apply = getattr(import_optional("diffusers.hooks", "diffusers"), name)
    return HookedModel(task, lambda model, _: apply(model, config))


def _config(name: str, **values: Any) -> Any:
    return getattr(import_optional("diffusers.hooks", "diffusers"), name)(**values)


# The caches ------------------------------------------------------------------------------------------------------


def _taylorseer_settings(task: PeerTask) -> list[Setting]:
    return [
        {"cache_interval": interval, "disable_cache_before_step": warmup, "max_order": order, "forecasts": what}
        for warmup, interval, _ in task.families()
        for what, orders in (("modules", (1, 2, 3)), ("blocks", (1, 2)))
        for order in orders
    ]


def _taylorseer(task: PeerTask, setting: Setting) -> Denoiser:
    values = dict(setting)
    identifiers = [BLOCKS if values.pop("forecasts") == "blocks" else MODULES]
    config = _config(
        "TaylorSeerCacheConfig", cache_identifiers=identifiers, taylor_factors_dtype=torch.float32, **values
    )
    return _hooked(task, "apply_taylorseer_cache", config)


def _first_block_settings(task: PeerTask) -> list[Setting]:
    return grid(threshold=[round(2 / 1.35**power, 4) for power in range(18)])


def _first_block(task: PeerTask, setting: Setting) -> Denoiser:
    return _hooked(task, "apply_first_block_cache", _config("FirstBlockCacheConfig", **setting))


def _mag_settings(task: PeerTask) -> list[Setting]:
    return grid(
        threshold=[0.03, 0.06, 0.12, 0.25, 0.5, 1.0], max_skip_steps=[1, 2, 3, 5],
        retention_ratio=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    )  # fmt: skip


@cache
def _mag_ratios(task: PeerTask) -> list[float]:
    """What MagCache calibrates: it prints the ratios of a dense trajectory."""
    config = _config("MagCacheConfig", calibrate=True, num_inference_steps=task.steps)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        task.sample(_hooked(task, "apply_mag_cache", config), task.search_samples, task.search_seed)
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("[") and "," in line]
    ratios: list[float] = json.loads(line)
    return ratios


def _mag(task: PeerTask, setting: Setting) -> Denoiser:
    config = _config("MagCacheConfig", num_inference_steps=task.steps, mag_ratios=_mag_ratios(task), **setting)
    return _hooked(task, "apply_mag_cache", config)


def _sea_settings(task: PeerTask) -> list[Setting]:
    return grid(
        threshold=[0.02, 0.05, 0.1, 0.2, 0.4, 0.8], residual_order=[0, 1], retention_steps=[1, 3, 5, 8],
        cache_end_steps=[1, 2], max_consecutive_cached=[1, 2, 4],
    )  # fmt: skip


def _sea(task: PeerTask, setting: Setting) -> Denoiser:
    """Images count as one frame."""

    def latents(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return list(kwargs["hidden_states"].unsqueeze(2).unbind(0))

    return _hooked(task, "apply_sea_cache", _config("SeaCacheConfig", raw_vision_callback=latents, **setting))


def _broadcast_settings(task: PeerTask) -> list[Setting]:
    return grid(
        spatial_attention_block_skip_range=[2, 3, 4, 6],
        spatial_attention_timestep_skip_range=[(-1, high) for high in (400, 600, 800, 950)],
    )


def _broadcast(task: PeerTask, setting: Setting) -> Denoiser:
    def apply(model: nn.Module, calls: HookedModel) -> None:
        config = _config("PyramidAttentionBroadcastConfig", current_timestep_callback=lambda: calls.timestep, **setting)
        import_optional("diffusers.hooks", "diffusers").apply_pyramid_attention_broadcast(model, config)

    return HookedModel(task, apply)


def _faster_settings(task: PeerTask) -> list[Setting]:
    return grid(
        unconditional_batch_skip_range=[2, 3, 5, 8],
        unconditional_batch_timestep_skip_range=[(-1, high) for high in (450, 641, 800, 950)],
        spatial_attention_block_skip_range=[2, 3],
        spatial_attention_timestep_skip_range=[(-1, -1), (-1, 681)],
        alpha_low_frequency=[1.0, 1.1],
    )


def _faster(task: PeerTask, setting: Setting) -> Denoiser:
    def apply(model: nn.Module, calls: HookedModel) -> None:
        config = _config(
            "FasterCacheConfig", tensor_format="BCHW", current_timestep_callback=lambda: calls.timestep,
            alpha_high_frequency=setting["alpha_low_frequency"], attention_weight_callback=lambda _: 0.5,
            _unconditional_conditional_input_kwargs_identifiers=SPLIT_INPUTS, **setting,
        )  # fmt: skip
        import_optional("diffusers.hooks", "diffusers").apply_faster_cache(model, config)

    return HookedModel(task, apply, unguided_first=True)


SYSTEMS = (
    System("TaylorSeer", "diffusers", _taylorseer_settings, _taylorseer),
    System("First-Block-Cache", "diffusers", _first_block_settings, _first_block),
    System("MagCache", "diffusers", _mag_settings, _mag),
    System("SeaCache", "diffusers", _sea_settings, _sea),
    System("FasterCache", "diffusers", _faster_settings, _faster),
    System("Pyramid Attention Broadcast", "diffusers", _broadcast_settings, _broadcast),
)
