"""NVIDIA ModelOpt: quantised models made lazy, and lazy models quantised, in PyTorch, ONNX and engines."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, BranchKind, CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.mobile import convert_to_ort
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.errors import CaptureError
from lazy_compile.ir.fake_quantize import fake_quantize
from support.diffusers_families import FAMILIES
from support.toy_models import randomize

pytestmark = pytest.mark.filterwarnings("ignore")  # ModelOpt's own, about packages that it was not tested with

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ModelOpt scripts functions at import, which torch deprecates
    mtq = importlib.import_module("modelopt.torch.quantization")
    mto = importlib.import_module("modelopt.torch.opt")
    importlib.import_module("lazy_compile.integrations.modelopt")  # registers the mode

STEPS = 4
MODE = [("lazy_compile", {"reuse": "last"})]


class Quantised:
    """A model of a family and the same one quantised."""

    def __init__(self, family: str, config: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.family = family
        self.model, self.inputs = FAMILIES[family]()
        randomize(self.model)
        self.model.eval()
        self.config = config
        self.quantised = self.quantise(copy.deepcopy(self.model))

    def quantise(self, model: nn.Module) -> nn.Module:
        result: nn.Module = mtq.quantize(model, self.config, forward_loop=lambda model: model(**self.inputs))
        return result

    @torch.no_grad()
    def run(self, model: Callable[..., Any], step: int = 0) -> Tensor:
        time = torch.full_like(self.inputs["timestep"], 900 - 100 * step)
        result: Tensor = model(**{**self.inputs, "timestep": time}, return_dict=False)[0]
        return result


CASES = {"dit in int8": ("dit", "INT8_DEFAULT_CFG"), "pixart in fp8": ("pixart", "FP8_DEFAULT_CFG")}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if "fp8" in name else ()) for name in CASES],
)
def case(request: pytest.FixtureRequest) -> Quantised:
    family, config = CASES[request.param]
    return Quantised(family, getattr(mtq, config))


def lazy_of(case: Quantised) -> LazyModule:
    lazy = mto.apply_mode(copy.deepcopy(case.quantised), MODE)
    assert isinstance(lazy, LazyModule)
    return lazy


@pytest.fixture(scope="module")
def captured(case: Quantised) -> LazyModule:
    """What is tested of its graph, its caches and its file needs no capture of its own."""
    lazy = lazy_of(case)
    lazy.capture(**case.inputs)
    return lazy


@pytest.fixture
def lazy(captured: LazyModule) -> LazyModule:
    captured.policy = AlwaysCompute()
    captured.reset()
    captured.reset_stats()
    return captured


def every_second(lazy: LazyModule) -> Scheduled:
    return Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))


def test_a_quantised_model_is_gated_like_the_one_it_was_made_of(case: Quantised, lazy: LazyModule) -> None:
    assert torch.equal(case.run(lazy), case.run(case.quantised))
    assert not torch.equal(case.run(lazy), case.run(case.model))
    plain = lazy_compile.transform(case.model, case.inputs)
    for quantised, original in zip(lazy.branches, plain.branches, strict=True):
        assert (quantised.name, quantised.kind, quantised.macs) == (original.name, original.kind, original.macs)
        assert len(quantised.entries) == len(original.entries)
        assert quantised.row_separable
    assert BranchKind.MLP in {branch.kind for branch in lazy.branches}


@pytest.mark.slow
def test_a_lazy_model_can_be_quantised(case: Quantised) -> None:
    lazy = mto.apply_mode(copy.deepcopy(case.model), MODE)
    assert torch.equal(case.run(lazy), case.run(case.model))
    lazy = case.quantise(lazy)
    assert isinstance(lazy, LazyModule)
    assert torch.equal(case.run(lazy), case.run(case.quantised))


def test_a_checkpoint_brings_back_the_quantisers_and_the_policy(
    case: Quantised, lazy: LazyModule, tmp_path: Path
) -> None:
    lazy.policy = every_second(lazy)
    mto.save(lazy, tmp_path / "lazy.pth")
    again = mto.restore(copy.deepcopy(case.model), tmp_path / "lazy.pth")
    assert again.policy.schedule == lazy.policy.schedule
    assert again.lazy_config.reuse == "last"
    for step in range(STEPS):
        assert torch.equal(case.run(again, step), case.run(lazy, step))
    assert again.stats.lazy_ratio == 0.5


def test_the_original_keeps_its_record(case: Quantised) -> None:
    lazy = lazy_of(case)
    assert [mode for mode, _ in mto.modelopt_state(copy.deepcopy(lazy))["modelopt_state_dict"]][-1] == "lazy_compile"
    original = lazy_compile.restore(lazy)
    assert mto.conversion.ModeloptStateManager(original).has_state
    assert torch.equal(case.run(original), case.run(case.quantised))


def test_gradients_pass_within_the_range() -> None:
    values = torch.tensor([0.5, 3.0], requires_grad=True)
    fake_quantize(values, torch.tensor(1.0), -127, 127).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0]


def test_an_empty_range_gives_zeros() -> None:
    assert fake_quantize(torch.tensor([0.0, 1.0]), torch.tensor(0.0), -127, 127).tolist() == [0.0, 0.0]
    assert fake_quantize(torch.tensor([0.0, 1.0]), torch.tensor(0.0), 0, 0).isfinite().all()  # float8


def test_quantisers_stand_inside_the_arms(case: Quantised, lazy: LazyModule, tmp_path: Path) -> None:
    report = lazy_compile.export_onnx(
        lazy, tmp_path / "m.onnx", case.inputs, gating="input", predictors=False, dynamic=False
    )
    assert report.if_nodes == len(lazy.branches)
    assert report.heavy_ops_outside_if == ()
    for node in ir.load(tmp_path / "m.onnx").graph:
        if node.op_type == "If":
            kinds = [inner.op_type for inner in node.attributes["then_branch"].as_graph()]
            assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") >= 2
    lazy.policy = every_second(lazy)
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx"), lazy.policy)
    for step in range(STEPS):
        expected = case.run(lazy, step)
        # A value that lies between two steps of a quantiser may be rounded to the other one; where that happens in a
        # text, as in PixArt, every token reads it.
        allowed = 0.08 if case.family == "pixart" else 0.002
        assert _rms(case.run(denoiser, step) - expected) < allowed * _rms(expected)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_engines_branch_around_quantised_products(family: str, config: str, tmp_path: Path) -> None:
    case = Quantised(family, getattr(mtq, config))
    lazy = lazy_of(case)
    lazy.capture(**case.inputs)
    lazy_compile.export_onnx(lazy, tmp_path / "m.onnx", case.inputs, dynamic=False)
    structure = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", BuildConfig(flavor="rtx")).structure
    assert structure.problems == ()
    assert len(structure.branches) == len(lazy.branches)


@pytest.mark.slow
def test_weights_alone_as_integers_run_in_onnx_runtime(tmp_path: Path) -> None:
    case = Quantised("dit", mtq.INT8_WEIGHT_ONLY_CFG)
    lazy = lazy_of(case)
    lazy.capture(**case.inputs)
    lazy_compile.export_onnx(lazy, tmp_path / "m.onnx", case.inputs, gating="input", predictors=False, dynamic=False)
    lazy.policy = every_second(lazy)
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "m.onnx"), lazy.policy)
    for step in range(STEPS):
        assert torch.allclose(case.run(denoiser, step), case.run(lazy, step), atol=1e-4)
    assert denoiser.stats.lazy_ratio > 0
    convert_to_ort(tmp_path / "m.onnx", tmp_path / "m.ort")
    phone = EngineDenoiser(OnnxRunner(tmp_path / "m.ort"), lazy.policy)
    lazy.reset()
    for step in range(STEPS):
        assert torch.allclose(case.run(phone, step), case.run(lazy, step), atol=1e-4)


def test_without_the_mode_a_refusal_names_it() -> None:
    case = Quantised("dit", mtq.INT8_DEFAULT_CFG)
    with pytest.raises(CaptureError, match=r'mto\.apply_mode\(model, \[\("lazy_compile", {}\)\]\)'):
        lazy_compile.transform(case.quantised, case.inputs)
