"""lazy_compile: compile any diffusion transformer into one that skips the branches a denoising step does not need.

>>> import torch, lazy_compile
>>> from lazy_compile.policy import Scheduled
>>> lazy = lazy_compile.transform(model)            # doctest: +SKIP
>>> lazy(latents, timestep=t)                       # doctest: +SKIP
"""

from lazy_compile.branch import BranchKind as BranchKind
from lazy_compile.branch import Refusal as Refusal
from lazy_compile.branch import ResidualBranch as ResidualBranch
from lazy_compile.compiler import load as load
from lazy_compile.compiler import restore as restore
from lazy_compile.compiler import transform as transform
from lazy_compile.config import LazyConfig as LazyConfig
from lazy_compile.errors import LazyCompileError as LazyCompileError
from lazy_compile.gate import GateTable as GateTable
from lazy_compile.module import LazyModule as LazyModule
from lazy_compile.policy import AlwaysCompute as AlwaysCompute
from lazy_compile.policy import Learned as Learned
from lazy_compile.policy import Policy as Policy
from lazy_compile.policy import Scheduled as Scheduled
from lazy_compile.schedule import CacheSchedule as CacheSchedule

__version__ = "0.1.0"
