"""The nodes of ``examples/comfyui``, on a stand-in of ComfyUI's interfaces."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazy_compile import AlwaysCompute, CacheSchedule, Policy, Scheduled
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.integrations.comfyui import LazyState, StepMask, patch, policy_of, state_of, unpatch
from support.comfy_stand_in import BaseModel, DiffusionModel, ModelPatcher, ReadsSigmas, Sampler, diffusion_model
from support.layers import WIDTH

NODES = Path(__file__).resolve().parents[2] / "examples" / "comfyui" / "__init__.py"
WINDOWS = ([0, 1, 2, 3], [2, 3, 4, 5])
SAMPLERS = {
    "cond alone": Sampler(cfg=1),
    "cond and uncond in one batch": Sampler(),
    "one after the other": Sampler(batched=False),
    "two images": Sampler(batch=2),
    "context windows": Sampler(windows=WINDOWS),
    "control": Sampler(control={"output": [torch.ones(1, 1, WIDTH)]}),
    "low VRAM": Sampler(low_vram=True),
}
LORA = {
    "diffusion_model.blocks.0.q.weight": 0.3 * torch.ones(WIDTH, WIDTH),
    "diffusion_model.blocks.0.up.weight": 0.3 * torch.eye(2 * WIDTH, WIDTH),
}


@pytest.fixture
def model() -> ModelPatcher:
    return ModelPatcher(BaseModel(diffusion_model()))


@pytest.fixture(scope="module")
def shared() -> tuple[ModelPatcher, ModelPatcher]:
    """A MODEL and its lazy clone, whose graphs many tests share; a test sets the policy that it needs."""
    model = ModelPatcher(BaseModel(diffusion_model()))
    return model, patch(model, AlwaysCompute())


@pytest.fixture(scope="module")
def nodes() -> Any:
    spec = importlib.util.spec_from_file_location("comfyui_lazy_compile", NODES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def state(patched: Any) -> LazyState:
    found = state_of(patched)
    assert found is not None
    return found


def ratio(patched: Any) -> float:
    assert state(patched).dense_because == ""
    return state(patched).lazy.stats.lazy_ratio


Pair = tuple[ModelPatcher, ModelPatcher]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_it_is_exact_and_then_lazy(shared: Pair, sampler: Sampler) -> None:
    model, patched = shared
    dense = sampler.sample(model, 0)
    state(patched).policy = AlwaysCompute()
    assert torch.equal(sampler.sample(patched, 0), dense)
    state(patched).policy = "balanced"
    samples = sampler.sample(patched, 0)
    assert ratio(patched) == pytest.approx(2 / 7)
    assert 0 < (samples - dense).abs().max() < 0.2
    assert torch.equal(sampler.sample(patched, 0), samples)  # a second run starts anew
    assert torch.equal(sampler.sample(model, 0), dense)  # the MODEL that went in


def test_a_batch_is_what_its_images_are_alone(shared: Pair) -> None:
    _, patched = shared
    state(patched).policy = "fast"
    together = Sampler(batch=2)
    singles = []
    for one in together.latents(0):
        alone = Sampler()
        alone.latents = lambda _, one=one: one[None]  # type: ignore[method-assign]
        singles.append(alone.sample(patched, 0))
    for sampler in (together, replace(together, batched=False)):
        assert torch.allclose(sampler.sample(patched, 0), torch.cat(singles), atol=1e-5)


def test_two_runs_that_take_turns_do_not_mix(shared: Pair) -> None:
    _, patched = shared
    state(patched).policy = "balanced"
    alone = [Sampler().sample(patched, seed) for seed in (0, 1)]
    with torch.inference_mode():
        runs = [Sampler().steps_of(patched, seed) for seed in (0, 1)]
        steps = [list(pair) for pair in zip(*runs, strict=True)]
    assert all(map(torch.equal, steps[-1], alone))
    assert not torch.equal(*alone)


@pytest.mark.parametrize(
    ("low_vram", "order"),
    [
        pytest.param(False, "LoRA first", marks=pytest.mark.slow),
        (False, "LoRA last"),
        (True, "LoRA last"),
    ],
)
def test_lora_in_either_order(model: ModelPatcher, low_vram: bool, order: str) -> None:
    sampler, adapted = Sampler(low_vram=low_vram), model.clone()
    adapted.add_patches(LORA)
    dense = sampler.sample(adapted, 0)
    assert not torch.allclose(dense, sampler.sample(model, 0), atol=1e-2)
    patched = patch(adapted if order == "LoRA first" else model, AlwaysCompute())
    if order == "LoRA last":
        assert torch.equal(sampler.sample(patched, 0), sampler.sample(model, 0))
        patched = patched.clone()
        patched.add_patches(LORA)
    assert torch.equal(sampler.sample(patched, 0), dense)
    assert state(patched).dense_because == ""


# What no graph can follow ---------------------------------------------------------------------------------------------


def test_a_patch_inside_the_model_runs_dense_and_says_so(model: ModelPatcher, caplog: Any) -> None:
    model.set_model_patch_replace(lambda h, block: 0.5 * h, "dit", "block", 0)
    dense, patched = Sampler().sample(model, 0), patch(model, "fast")
    assert torch.equal(Sampler().sample(patched, 0), dense)
    assert "a patch of 'patches_replace' runs inside it" in state(patched).report
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_a_wrapper_of_the_diffusion_model_runs_dense(model: ModelPatcher) -> None:
    model.add_wrapper_with_key("diffusion_model", "easycache", lambda executor, *args: 0.9 * executor(*args))
    dense, patched = Sampler().sample(model, 0), patch(model, "fast")
    assert torch.equal(Sampler().sample(patched, 0), dense)
    assert "'easycache' runs inside it" in state(patched).report


def test_a_model_that_reads_the_sigmas_runs_dense() -> None:
    model = ModelPatcher(BaseModel(diffusion_model(ReadsSigmas)))
    dense, patched = Sampler().sample(model, 0), patch(model, "fast")
    assert torch.equal(Sampler().sample(patched, 0), dense)
    assert "transformer_options['sigmas']" in state(patched).report


def test_options_that_are_read_past_the_dictionary_are_noticed() -> None:
    class ReadsACopy(DiffusionModel):
        def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Any) -> Tensor:
            scale = 2 if {**options}.get("cond_or_uncond") == [0, 1] else 1
            return scale * super()._forward(x, timestep, context, control, options)

    model = ModelPatcher(BaseModel(diffusion_model(ReadsACopy)))
    dense, patched = Sampler().sample(model, 0), patch(model, "fast")
    assert torch.equal(Sampler().sample(patched, 0), dense)
    assert "answers otherwise" in state(patched).report


def test_a_patch_that_takes_the_place_is_noticed(model: ModelPatcher) -> None:
    def compiled(executor: Any, *args: Any, **kwargs: Any) -> Any:
        stand_in, executor.class_obj.diffusion_model = executor.class_obj.diffusion_model, other
        try:
            return executor(*args, **kwargs)
        finally:
            executor.class_obj.diffusion_model = stand_in

    other = diffusion_model()
    patched = patch(model, "fast")
    patched.add_wrapper_with_key("apply_model", "torch.compile", compiled)
    Sampler().sample(patched, 0)
    assert "another patch runs the diffusion model" in state(patched).report


def test_a_model_without_branches_runs_dense() -> None:
    class Plain(DiffusionModel):
        def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Any) -> Tensor:
            return x * timestep[:, None, None, None]

    model = ModelPatcher(BaseModel(diffusion_model(Plain)))
    patched = patch(model, "fast")
    assert torch.equal(Sampler().sample(patched, 0), Sampler().sample(model, 0))
    assert "nothing was reused" in state(patched).report


def test_a_failure_puts_the_model_back(model: ModelPatcher) -> None:
    class Fails(Sampler):
        def conds(self, seed: int) -> Any:
            found = super().conds(seed)
            found[0].context = found[0].context[..., :3]
            return found[:1]

    dense = model.model.diffusion_model
    with pytest.raises(Exception, match=r"."):
        Fails(cfg=1).sample(patch(model, "fast"), 0)
    assert model.model.diffusion_model is dense


# Nodes ----------------------------------------------------------------------------------------------------------------


def test_the_nodes(nodes: Any, model: ModelPatcher) -> None:
    (patched,) = nodes["LazyCompilePreset"]().apply(model, "balanced", "last")
    samples = Sampler().sample(patched, 0)
    read = nodes["LazyCompileStats"]().read(patched, {"samples": samples})
    assert read["result"][0]["samples"] is samples
    assert "29% of the evaluations of 2 branches reused" in read["ui"]["text"][0]
    (off,) = nodes["LazyCompilePreset"]().apply(patched, "off", "last")
    assert torch.equal(Sampler().sample(off, 0), Sampler().sample(model, 0))
    assert "has no Lazy Compile node" in nodes["LazyCompileStats"]().read(off, {})["result"][1]
    assert math.isnan(nodes["LazyCompileStats"].IS_CHANGED(model=patched))
    (masked,) = nodes["LazyCompileSchedule"]().apply(patched, "1, 1, 0, 0", "linear")
    assert state(masked).policy == StepMask("1100")
    for node in nodes.values():
        assert "model" in node.INPUT_TYPES()["required"]
        assert callable(getattr(node, node.FUNCTION))


def test_schedules(shared: Pair, tmp_path: Path) -> None:
    _, patched = shared
    state(patched).policy = AlwaysCompute()
    Sampler().sample(patched, 0)
    lazy = state(patched).lazy
    lazy.policy = Scheduled(CacheSchedule.every(2, steps=7, branches=len(lazy.branches)))
    lazy.save(tmp_path / "plan")
    for text, share in [(str(tmp_path / "plan"), 3 / 7), ("1 1 0 0", 2 / 7)]:
        state(patched).policy = policy_of(text)
        Sampler().sample(patched, 0)
        assert ratio(patched) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0111", "1x", "", " ", "slow"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        policy_of(text)


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        policy_of(str(tmp_path))


def test_a_module_is_no_model_patcher() -> None:
    for action in (lambda: patch(nn.Linear(2, 2), "fast"), lambda: unpatch(None), lambda: state_of(1)):
        with pytest.raises(ConfigError, match="expected ComfyUI's ModelPatcher"):
            action()


def test_a_mask_is_written_to_files() -> None:
    assert Policy.kinds["step_mask"].from_dict(*StepMask("1101").to_dict()) == StepMask("1101")
