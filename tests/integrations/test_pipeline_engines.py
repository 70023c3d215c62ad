"""One call from a pipeline to an exported model in it, that serves all sizes; against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import BuildConfig, CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import BackendError, ConfigError
from lazy_compile.integrations import pipeline_engines
from lazy_compile.integrations.engine_module import EngineModule
from lazy_compile.integrations.pipeline_engines import export_pipeline
from support.diffusers_pipelines import CASES, STEPS, Case, sd3

# Two of diffusers' schedulers trip over numpy's own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-3
"""Largest difference per unit of the largest value, after a whole trajectory."""

SIZES: dict[str, list[dict[str, int]]] = {
    "dit": [{}],
    "pixart": [{}],
    "sd3": [{"height": 8, "width": 8}, {"height": 12, "width": 8}, {"height": 4, "width": 12}],
    "flux": [{"height": 16, "width": 16}, {"height": 24, "width": 16}, {"height": 8, "width": 24}],
    "wan": [{"height": 32, "width": 32}, {"height": 48, "width": 32}, {"height": 32, "width": 64, "num_frames": 9}],
}
"""Resolutions of each pipeline; DiT and PixArt fix theirs by a table of positions."""


def arguments(case: Case, images: int, words: int) -> dict[str, Any]:
    """For another number of images and another length of the prompt."""
    found: dict[str, Any] = {}
    for name, value in case.arguments.items():
        if isinstance(value, Tensor):
            short = value[:, :words] if value.dim() > 1 and "pooled" not in name else value
            found[name] = short.repeat_interleave(images, 0)
    if "class_labels" in case.arguments:
        found["class_labels"] = [1, 2, 3][: images + 1]
    return found


@dataclass
class Exported:
    """A pipeline, its lazy denoiser, and the file that ``export_pipeline`` wrote of it."""

    case: Case
    lazy: LazyModule
    path: Path

    @classmethod
    def of(cls, case: Case, sizes: dict[str, int], folder: Path) -> Exported:
        lazy_compile.transform(case.pipe)
        case.sample(num_inference_steps=1)
        lazy, path = case.model, folder / "m.onnx"
        policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
        engine = export_pipeline(case.pipe, path, {**case.arguments, **sizes}, policy=policy)
        assert case.model is engine
        return cls(case, lazy, path)

    def difference(self, changes: dict[str, Any]) -> float:
        """Between PyTorch and the file, per unit of the largest value, after a whole trajectory."""
        engine, samples = self.case.model, []
        for model in (self.lazy, engine):
            model.reset_stats()
            setattr(self.case.pipe, self.case.denoiser, model)
            samples.append(self.case.sample(**changes))
            assert model.stats.lazy_ratio == 0.5
        expected, seen = samples
        assert seen.shape == expected.shape
        return float((seen - expected).abs().max() / expected.abs().max())


def holds_for_all_calls(exported: Exported, name: str) -> None:
    guidances: list[dict[str, float]] = [{}] if name in ("dit", "flux") else [{}, {"guidance_scale": 1.0}]
    for number, sizes in enumerate(SIZES[name]):
        for images, words in ((1, 5), (2, 3)):
            changes = {**arguments(exported.case, images, words), **sizes, **guidances[number % len(guidances)]}
            assert exported.difference(changes) < TOLERANCE, (sizes, images, words)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported.of(sd3(layers=1), SIZES["sd3"][0], tmp_path_factory.mktemp("sd3"))


def test_one_file_serves_every_call_of_a_pipeline(exported: Exported) -> None:
    holds_for_all_calls(exported, "sd3")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_so_it_is_with_pipelines_of_all_kinds(name: str, tmp_path: Path) -> None:
    holds_for_all_calls(Exported.of(CASES[name](), SIZES[name][0], tmp_path), name)


def test_the_range_of_an_engine_is_that_of_the_calls(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine needs a GPU, so that here its file is run, and what is asked of the builder is looked at."""
    asked: list[BuildConfig] = []
    open_engine = EngineModule.__init__

    def build(onnx: Path, engine: Path, config: BuildConfig, **_: Any) -> None:
        assert engine == onnx.with_suffix(".engine")
        asked.append(config)

    def open_onnx(self: EngineModule, source: Path, **options: Any) -> None:
        open_engine(self, source.with_suffix(".onnx"), **options)

    monkeypatch.setattr(pipeline_engines, "build_engine", build)
    monkeypatch.setattr(pipeline_engines, "export_onnx", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(EngineModule, "__init__", open_onnx)
    case = exported.case
    case.pipe.transformer = exported.lazy
    large = {**case.arguments, **arguments(case, 2, 3), "height": 12}
    export_pipeline(case.pipe, exported.path, [case.arguments, large], build=BuildConfig(flavor="rtx"))
    (profile,) = asked[0].profiles
    assert [each["hidden_states"] for each in profile.complete] == [(2, 4, 8, 8), (2, 4, 8, 8), (4, 4, 12, 8)]
    assert [each["encoder_hidden_states"] for each in profile.complete] == [(2, 3, 12), (2, 5, 12), (4, 5, 12)]
    with pytest.raises(ConfigError, match="transformer of this StableDiffusion3Pipeline is exported already"):
        export_pipeline(case.pipe, exported.path, case.arguments)


def test_what_cannot_be_exported_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    case = CASES["dit"]()
    path = tmp_path / "dit.onnx"
    with pytest.raises(BackendError, match="an engine runs on a GPU, and PyTorch sees none here; leave build out"):
        export_pipeline(case.pipe, path, case.arguments, build=BuildConfig(flavor="rtx"))
    with pytest.raises(ConfigError, match="calls is empty"):
        export_pipeline(case.pipe, path, [])
    with pytest.raises(ConfigError, match="DiTPipeline has no model 'unet'"):
        export_pipeline(case.pipe, path, case.arguments, component="unet")
    with pytest.raises(ConfigError, match="takes a diffusers pipeline; seen Linear"):
        export_pipeline(nn.Linear(2, 2), path, {})
    assert type(case.model) is not EngineModule
    assert not path.exists()
