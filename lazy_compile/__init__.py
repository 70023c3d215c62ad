"""lazy_compile: compile any diffusion transformer into one that skips the branches a denoising step does not need.

lazy = lazy_compile.transform(model)
lazy_compile.calibrate(lazy, lazy_compile.CalibrationConfig(target_lazy_ratio=0.5), sample=sample)
images = sample(lazy, seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazy_compile.backends.onnx.export import export_onnx as export_onnx
    from lazy_compile.backends.onnx.replace_weights import replace_weights as replace_weights
    from lazy_compile.backends.onnx.structure import check_structure as check_structure
    from lazy_compile.backends.tensorrt.build import build_engine as build_engine
    from lazy_compile.backends.tensorrt.build import build_engines as build_engines
    from lazy_compile.backends.tensorrt.config import BuildConfig as BuildConfig
    from lazy_compile.backends.triton import export_triton as export_triton
    from lazy_compile.calibration.calibrator import CalibrationConfig as CalibrationConfig
    from lazy_compile.calibration.calibrator import CalibrationReport as CalibrationReport
    from lazy_compile.calibration.calibrator import StepPair as StepPair
    from lazy_compile.calibration.calibrator import calibrate as calibrate
    from lazy_compile.compiler import load as load
    from lazy_compile.compiler import restore as restore
    from lazy_compile.compiler import transform as transform
    from lazy_compile.config import LazyConfig as LazyConfig
    from lazy_compile.errors import LazyCompileError as LazyCompileError
    from lazy_compile.execution import run as run
    from lazy_compile.integrations.diffusers_cache import apply_lazy_cache as apply_lazy_cache
    from lazy_compile.integrations.diffusers_enable_cache import LazyCacheConfig as LazyCacheConfig
    from lazy_compile.integrations.pipeline_engines import export_pipeline as export_pipeline
    from lazy_compile.ir.branch import BranchKind as BranchKind
    from lazy_compile.ir.branch import Refusal as Refusal
    from lazy_compile.ir.branch import ResidualBranch as ResidualBranch
    from lazy_compile.planning.budget import Budget as Budget
    from lazy_compile.planning.estimate import PlanEstimate as PlanEstimate
    from lazy_compile.planning.reuse_effects import measure_effects as measure_effects
    from lazy_compile.plans import estimate_plan as estimate_plan
    from lazy_compile.plans import plan as plan
    from lazy_compile.policies.gate_table import GateTable as GateTable
    from lazy_compile.policies.learned import Learned as Learned
    from lazy_compile.policies.policy import AlwaysCompute as AlwaysCompute
    from lazy_compile.policies.policy import Policy as Policy
    from lazy_compile.policies.policy import Scheduled as Scheduled
    from lazy_compile.policies.presets import PRESETS as PRESETS
    from lazy_compile.policies.presets import EveryNth as EveryNth
    from lazy_compile.policies.schedule import CacheSchedule as CacheSchedule
    from lazy_compile.reporting.html_report import write_report as report
    from lazy_compile.reporting.inspection import inspect as inspect
    from lazy_compile.reporting.summary import summary as summary
    from lazy_compile.runtime.module import LazyModule as LazyModule
    from lazy_compile.side_by_side import compare as compare
    from lazy_compile.verification import compare as verify

__version__ = "0.1.0"

_HOMES = {
    "AlwaysCompute": "lazy_compile.policies.policy",
    "BranchKind": "lazy_compile.ir.branch",
    "Budget": "lazy_compile.planning.budget",
    "BuildConfig": "lazy_compile.backends.tensorrt.config",
    "CacheSchedule": "lazy_compile.policies.schedule",
    "CalibrationConfig": "lazy_compile.calibration.calibrator",
    "CalibrationReport": "lazy_compile.calibration.calibrator",
    "EveryNth": "lazy_compile.policies.presets",
    "GateTable": "lazy_compile.policies.gate_table",
    "LazyCacheConfig": "lazy_compile.integrations.diffusers_enable_cache",
    "LazyCompileError": "lazy_compile.errors",
    "LazyConfig": "lazy_compile.config",
    "LazyModule": "lazy_compile.runtime.module",
    "Learned": "lazy_compile.policies.learned",
    "PRESETS": "lazy_compile.policies.presets",
    "PlanEstimate": "lazy_compile.planning.estimate",
    "Policy": "lazy_compile.policies.policy",
    "Refusal": "lazy_compile.ir.branch",
    "ResidualBranch": "lazy_compile.ir.branch",
    "Scheduled": "lazy_compile.policies.policy",
    "StepPair": "lazy_compile.calibration.calibrator",
    "apply_lazy_cache": "lazy_compile.integrations.diffusers_cache",
    "build_engine": "lazy_compile.backends.tensorrt.build",
    "build_engines": "lazy_compile.backends.tensorrt.build",
    "calibrate": "lazy_compile.calibration.calibrator",
    "check_structure": "lazy_compile.backends.onnx.structure",
    "compare": "lazy_compile.side_by_side",
    "estimate_plan": "lazy_compile.plans",
    "export_onnx": "lazy_compile.backends.onnx.export",
    "export_pipeline": "lazy_compile.integrations.pipeline_engines",
    "export_triton": "lazy_compile.backends.triton",
    "inspect": "lazy_compile.reporting.inspection",
    "load": "lazy_compile.compiler",
    "measure_effects": "lazy_compile.planning.reuse_effects",
    "plan": "lazy_compile.plans",
    "replace_weights": "lazy_compile.backends.onnx.replace_weights",
    "report": "lazy_compile.reporting.html_report:write_report",
    "restore": "lazy_compile.compiler",
    "run": "lazy_compile.execution",
    "summary": "lazy_compile.reporting.summary",
    "transform": "lazy_compile.compiler",
    "verify": "lazy_compile.verification:compare",
}
"""Where each public name lies; a name that is another there stands behind a colon."""

__all__ = [
    "PRESETS",
    "AlwaysCompute",
    "BranchKind",
    "Budget",
    "BuildConfig",
    "CacheSchedule",
    "CalibrationConfig",
    "CalibrationReport",
    "EveryNth",
    "GateTable",
    "LazyCacheConfig",
    "LazyCompileError",
    "LazyConfig",
    "LazyModule",
    "Learned",
    "PlanEstimate",
    "Policy",
    "Refusal",
    "ResidualBranch",
    "Scheduled",
    "StepPair",
    "apply_lazy_cache",
    "build_engine",
    "build_engines",
    "calibrate",
    "check_structure",
    "compare",
    "estimate_plan",
    "export_onnx",
    "export_triton",
    "inspect",
    "load",
    "measure_effects",
    "plan",
    "replace_weights",
    "report",
    "restore",
    "run",
    "summary",
    "transform",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
