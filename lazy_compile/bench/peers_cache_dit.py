"""cache-dit (https://github.com/vipshop/cache-dit) on a bare transformer: dynamic and static Dual Block Cache.

The package is no dependency: ``make peers`` installs it beside the environment. Each trajectory has a copy of the
model, since without a pipeline nothing tells the cache that another one begins.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

from lazy_compile.bench.peer_task import Denoiser, PeerTask, Setting, System, drawn, grid
from lazy_compile.errors import MissingDependencyError

CALIBRATORS = ("none", "TaylorSeer 1", "TaylorSeer 2", "FoCa")


def _dynamic_settings(task: PeerTask) -> list[Setting]:
    _package()
    return grid(
        Fn_compute_blocks=[1, 2], Bn_compute_blocks=[0, 1], max_warmup_steps=[2, 4, 6, 8],
        residual_diff_threshold=[0.05, 0.1, 0.2, 0.4, 0.8], max_continuous_cached_steps=[-1, 1, 2, 3],
        calibrator=CALIBRATORS,
    )  # fmt: skip


def _static_settings(task: PeerTask) -> list[Setting]:
    """The steps that TaylorSeer computes after a warm-up; the first block always does."""
    _package()
    return drawn(
        [
            {"warmup": warmup, "interval": interval, "calibrator": calibrator}
            for warmup, interval, _ in task.families()
            for calibrator in CALIBRATORS
        ]
    )


def _static(task: PeerTask, setting: Setting) -> Denoiser:
    known = {(warmup, interval): steps for warmup, interval, steps in task.families()}
    mask = [int(step in known[setting["warmup"], setting["interval"]]) for step in range(task.steps)]
    config = {"Fn_compute_blocks": 1, "steps_computation_mask": mask, "steps_computation_policy": "static"}
    return _cached(task, config, setting["calibrator"])


def _dynamic(task: PeerTask, setting: Setting) -> Denoiser:
    values = dict(setting)
    calibrator = values.pop("calibrator")
    return _cached(task, values, calibrator)


def _cached(task: PeerTask, values: dict[str, Any], calibrator: str) -> Denoiser:
    """The default number of blocks that always compute, 8, is more than these models have."""
    package = _package()
    model = copy.deepcopy(task.subject.model)
    two_streams = task.name == "scenes"
    pattern = package.ForwardPattern.Pattern_1 if two_streams else package.ForwardPattern.Pattern_3
    extra = {}
    if task.name == "digits":
        functors = importlib.import_module("cache_dit.caching.patch_functors")
        extra = {"patch_functor": functors.DiTPatchFunctor()}
    name, *order = calibrator.split()
    with _quietly():
        adapter = package.BlockAdapter(
            transformer=model, blocks=model.transformer_blocks, forward_pattern=pattern, check_forward_pattern=False,
            has_separate_cfg=False, **extra,
        )  # fmt: skip
        forecast = {
            "none": lambda: None,
            "TaylorSeer": lambda: package.TaylorSeerCalibratorConfig(taylorseer_order=int(order[0])),
            "FoCa": package.FoCaCalibratorConfig,
        }[name]()
        config = package.DBCacheConfig(num_inference_steps=task.steps, **values)
        package.enable_cache(adapter, cache_config=config, calibrator_config=forecast)
    denoiser: Denoiser = model
    return denoiser


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@cache
def _package() -> Any:
    try:
        with _quietly():
            return importlib.import_module("cache_dit")
    except ImportError as error:
        raise MissingDependencyError(f"cache-dit cannot be imported ({error}); `make peers` installs it") from error


SYSTEMS = (
    System("DBCache", "cache-dit", _dynamic_settings, _dynamic),
    System("DBCache, static mask", "cache-dit", _static_settings, _static),
)
