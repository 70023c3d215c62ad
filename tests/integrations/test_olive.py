"""The passes of ``examples/olive``, run by ``make test-olive``, which installs Olive beside the environment."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.seal import seal_of
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ArtifactError
from support.small_model import SMALL, STEPS, run
from support.toy_models import call, trajectory

pytestmark = [pytest.mark.olive, pytest.mark.filterwarnings("ignore")]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "olive"
IN_ARMS = {"extra_options": {"EnableSubgraph": True}}


@pytest.fixture(scope="module")
def passes() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    patch.syspath_prepend(EXAMPLE)
    yield importlib.import_module("olive_lazy_compile")
    patch.undo()


def apply(kind: Any, model: Any, output: Path, **config: Any) -> Any:
    from olive.passes.olive_pass import create_pass_from_dict

    return create_pass_from_dict(kind, config, disable_search=True).run(model, str(output))


@pytest.fixture(scope="module")
def exported(passes: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from olive.model import PyTorchModelHandler

    model = PyTorchModelHandler(model_loader=lambda _: SMALL.model(), dummy_inputs_func=lambda _: call(SMALL))
    return apply(passes.LazyCompile, model, tmp_path_factory.mktemp("olive") / "lazy")


def quantised(model: Any, output: Path, **config: Any) -> Any:
    from olive.passes.onnx.quantization import OnnxDynamicQuantization

    return apply(OnnxDynamicQuantization, model, output, **config)


def sampled(path: str, every: int) -> tuple[torch.Tensor, float]:
    engine = EngineDenoiser(OnnxRunner(path))
    engine.policy = CacheSchedule.every(every, STEPS, 2)
    return torch.stack(run(engine, trajectory(SMALL, 2, steps=STEPS))), engine.stats.lazy_ratio  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, 2])
def test_what_olive_quantises_still_skips(passes: Any, exported: Any, tmp_path: Path, every: int) -> None:
    changed = quantised(exported, tmp_path / "int8", **IN_ARMS)
    with pytest.raises(ArtifactError, match="carries no digest at its end"):
        OnnxRunner(changed.model_path)
    ready = apply(passes.LazyCompileSeal, changed, tmp_path / "ready")
    assert seal_of(Path(ready.model_path)) is not None
    assert Path(ready.model_path).stat().st_size < 0.7 * Path(exported.model_path).stat().st_size
    samples, ratio = sampled(ready.model_path, every)
    expected, _ = sampled(exported.model_path, every)
    lazy = lazy_compile.transform(SMALL.model(), call(SMALL))
    lazy.policy = CacheSchedule.every(every, STEPS, 2)
    torch.testing.assert_close(
        expected, torch.stack(run(lazy, trajectory(SMALL, 2, steps=STEPS))), atol=1e-4, rtol=1e-4
    )
    assert ratio == 1 - 1 / every
    assert 0 < (samples - expected).abs().max() < 0.1 * expected.abs().max()


def test_arms_that_were_left_out_are_an_error(passes: Any, exported: Any, tmp_path: Path) -> None:
    changed = quantised(exported, tmp_path / "int8")
    with pytest.raises(ArtifactError, match="no quantised operator in the arms of its gates; give the quantisation"):
        apply(passes.LazyCompileSeal, changed, tmp_path / "ready")
