"""Pipelines of diffusers with an exported model in the place of their transformer, ONNX Runtime behind it."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, Scheduled
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ArtifactError, BackendError, ConfigError
from lazy_compile.integrations.engine_module import EngineModule, observed_call
from support.diffusers_pipelines import CASES, STEPS, Case, dit, wan
from support.hoisting import counted
from support.slow import slow_but

# Two of diffusers' schedulers trip over numpy's own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-3
"""Largest difference per unit of the largest value, after a whole trajectory."""


Exported = Callable[[str], tuple[Case, Any, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A pipeline with a lazy denoiser, that denoiser, and what was exported for the calls that the pipeline makes."""
    made: dict[str, tuple[Case, Any, Path]] = {}

    def get(name: str) -> tuple[Case, Any, Path]:
        if name not in made:
            case, path = CASES[name](), tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
            lazy_compile.transform(case.pipe)
            with observed_call(case.model) as example:
                case.sample(num_inference_steps=1)
            export_onnx(case.model, path, example, gating="input", predictors=False, dynamic=False)
            made[name] = case, case.model, path
        case, lazy, _ = made[name]
        lazy.policy = AlwaysCompute()
        replace(case, lazy)
        return made[name]

    return get


def replace(case: Case, module: Any) -> None:
    setattr(case.pipe, case.denoiser, module)


def difference(seen: torch.Tensor, expected: torch.Tensor) -> float:
    return float((seen - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", slow_but(["wan"], CASES))
def test_a_pipeline_runs_with_an_exported_model(name: str, exported: Exported) -> None:
    case, lazy, path = exported(name)
    for policy in (AlwaysCompute(), Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))):
        replace(case, lazy)
        lazy.policy = policy
        expected = case.sample()
        replace(case, EngineModule(path, like=lazy, policy=policy))
        assert difference(case.sample(), expected) < TOLERANCE
        assert case.model.stats.lazy_ratio == lazy.stats.lazy_ratio
    assert case.model.stats.lazy_ratio == 0.5
    assert torch.equal(case.sample(), case.sample()), "a second sample starts afresh"


@pytest.mark.slow
def test_a_pipeline_computes_what_follows_from_its_prompts_once(exported: Exported, tmp_path: Path) -> None:
    case, lazy, path = exported("wan")
    with observed_call(lazy) as example:
        case.sample(num_inference_steps=1)
    names = ("encoder_hidden_states",)
    export_onnx(lazy, tmp_path / "m.onnx", example, gating="input", predictors=False, invariants=names, dynamic=False)
    policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    replace(case, EngineModule(path, like=lazy, policy=policy))
    expected = case.sample()
    runner = OnnxRunner(tmp_path / "m.onnx")
    prologues = counted(runner)
    replace(case, EngineModule(runner, like=lazy, policy=policy))
    assert torch.equal(case.sample(), expected)
    assert len(prologues) == 2, "one for each prompt of the guidance"


def test_it_is_taken_for_the_original_and_keeps_none_of_its_weights(exported: Exported, tmp_path: Path) -> None:
    case, path = wan(), exported("wan")[2]
    original = case.model
    module = EngineModule(OnnxRunner(path), like=original)
    case.pipe.transformer = module
    assert isinstance(module, diffusers.WanTransformer3DModel)
    assert type(module) is EngineModule
    assert case.pipe.config["transformer"] == ("diffusers", "WanTransformer3DModel")
    assert (module.config, module.dtype, module.device) == (original.config, original.dtype, original.device)
    assert inspect.signature(module.forward) == inspect.signature(original.forward)
    assert list(module.parameters()) == []
    case.sample()
    weights = weakref.ref(original)
    del original, module
    gc.collect()
    assert weights() is None
    case.sample()
    with pytest.raises(BackendError, match="an exported model has no weights to save; copy its file"):
        case.pipe.save_pretrained(tmp_path / "pipe")


def test_a_call_of_other_sizes_says_what_was_exported(exported: Exported, tmp_path: Path) -> None:
    case, lazy, _ = exported("wan")
    with observed_call(lazy) as example:
        case.sample(num_inference_steps=1)
    export_onnx(lazy, tmp_path / "m.onnx", example, gating="input", predictors=False, dynamic=False)
    replace(case, EngineModule(tmp_path / "m.onnx", like=lazy))
    with pytest.raises(
        ConfigError, match=r"input 'hidden_states' is float32\[2, 4, .*; the model was exported for float32"
    ):
        case.sample(num_videos_per_prompt=2)


def test_conditions_that_are_called_apart_do_not_mix(exported: Exported) -> None:
    """Without guidance Wan calls once a step; with it twice, each in a cache context of its own."""
    case, lazy, path = exported("wan")
    policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    replace(case, EngineModule(path, like=lazy, policy=policy))
    alone = case.sample(guidance_scale=1.0)
    prompt = case.arguments["prompt_embeds"]
    together = case.sample(guidance_scale=5.0, prompt_embeds=prompt, negative_prompt_embeds=prompt)
    assert difference(together, alone) < TOLERANCE
    assert len(case.model.denoiser.runner.streams) > 1


def test_a_model_of_other_sizes_is_refused(exported: Exported) -> None:
    _, _, path = exported("wan")
    with pytest.raises(
        ArtifactError, match="was exported from another WanTransformer3DModel than this DiTTransformer2D"
    ):
        EngineModule(path, like=dit().model)
