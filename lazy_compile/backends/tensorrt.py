"""TensorRT and TensorRT-RTX: engines whose branches are truly skipped. The packages are imported when needed."""

from lazy_compile.backends.tensorrt_build import BuildReport as BuildReport
from lazy_compile.backends.tensorrt_build import build_engine as build_engine
from lazy_compile.backends.tensorrt_build import build_engines as build_engines
from lazy_compile.backends.tensorrt_check import EngineStructure as EngineStructure
from lazy_compile.backends.tensorrt_check import check_branches as check_branches
from lazy_compile.backends.tensorrt_config import BuildConfig as BuildConfig
from lazy_compile.backends.tensorrt_layers import EngineLayer as EngineLayer
from lazy_compile.backends.tensorrt_layers import parse_layers as parse_layers
from lazy_compile.backends.tensorrt_preview import BuildPreview as BuildPreview
from lazy_compile.backends.tensorrt_preview import preview as preview
from lazy_compile.backends.tensorrt_runner import TensorRTRunner as TensorRTRunner
from lazy_compile.backends.tensorrt_sidecar import EngineSidecar as EngineSidecar
