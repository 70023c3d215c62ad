"""lazy_compile: compile any diffusion transformer into one that skips the branches a denoising step does not need.

lazy = lazy_compile.transform(model)
lazy_compile.calibrate(lazy, lazy_compile.CalibrationConfig(target_lazy_ratio=0.5), sample=sample)
images = sample(lazy, seed=0)
"""

from lazy_compile.backends.onnx.export import export_onnx as export_onnx
from lazy_compile.backends.onnx.structure import check_structure as check_structure
from lazy_compile.backends.tensorrt.build import build_engine as build_engine
from lazy_compile.backends.tensorrt.config import BuildConfig as BuildConfig
from lazy_compile.calibration.calibrator import CalibrationConfig as CalibrationConfig
from lazy_compile.calibration.calibrator import CalibrationReport as CalibrationReport
from lazy_compile.calibration.calibrator import StepPair as StepPair
from lazy_compile.calibration.calibrator import calibrate as calibrate
from lazy_compile.compiler import load as load
from lazy_compile.compiler import restore as restore
from lazy_compile.compiler import transform as transform
from lazy_compile.config import LazyConfig as LazyConfig
from lazy_compile.errors import LazyCompileError as LazyCompileError
from lazy_compile.integrations.diffusers_cache import apply_lazy_cache as apply_lazy_cache
from lazy_compile.ir.branch import BranchKind as BranchKind
from lazy_compile.ir.branch import Refusal as Refusal
from lazy_compile.ir.branch import ResidualBranch as ResidualBranch
from lazy_compile.planning.planner import Budget as Budget
from lazy_compile.planning.planner import plan as plan
from lazy_compile.planning.reuse_effects import measure_effects as measure_effects
from lazy_compile.policies.gate_table import GateTable as GateTable
from lazy_compile.policies.policy import AlwaysCompute as AlwaysCompute
from lazy_compile.policies.policy import Learned as Learned
from lazy_compile.policies.policy import Policy as Policy
from lazy_compile.policies.policy import Scheduled as Scheduled
from lazy_compile.policies.schedule import CacheSchedule as CacheSchedule
from lazy_compile.runtime.module import LazyModule as LazyModule

__version__ = "0.1.0"
