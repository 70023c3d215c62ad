"""Other weights in an exported file, against a new export of the model that has them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.replace_weights import replace_weights
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ArtifactError, ConfigError
from support.hoisting import CONDITIONED, Conditioned
from support.layers import WIDTH
from support.small_model import SMALL, Small
from support.toy_models import Toy, call, trajectory

STEPS = 4
ADAPTED = ["q", "k", "v", "out"]


class Peculiar(Small):
    """A weight that becomes part of a constant, two of one content, and a square one that is symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.first, self.second = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.square.weight)

    def enter(self, x: Tensor, t: Tensor) -> Tensor:
        h = super().enter(x, t) * (1 + self.scale)
        return self.square(h * self.first).sin() * self.second


def export(model: nn.Module, toy: Toy, path: Path, **options: Any) -> Path:
    lazy = lazy_compile.transform(model.eval(), call(toy))
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    export_onnx(lazy, path, gating="input", predictors=False, **options, dynamic=False)
    return path


def initializers(path: Path) -> dict[str, bytes]:
    found = onnx.load(path).graph.initializer
    return {item.name: numpy_helper.to_array(item).tobytes() for item in found}


def outputs(path: Path, toy: Toy) -> list[Tensor]:
    denoiser = EngineDenoiser(OnnxRunner(path, threads=1))
    return [denoiser(**arguments) for arguments in trajectory(toy, steps=STEPS)]


def merged(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Conditioned().eval()


@pytest.fixture(scope="module")
def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=ADAPTED, init_lora_weights=False)
    return inject_adapter_in_model(config, copy.deepcopy(base))


@pytest.fixture(scope="module")
def plain(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(base, CONDITIONED, tmp_path_factory.mktemp("plain") / "model.onnx", invariants=("text",))


def test_a_swap_equals_a_fresh_export_with_the_lora_fused(
    base: nn.Module, adapted: nn.Module, plain: Path, tmp_path: Path
) -> None:
    fused = merged(copy.deepcopy(adapted))
    changed = replace_weights(plain, fused, tmp_path / "swapped.onnx")
    assert changed == tuple(
        sorted(name for name in base.state_dict() if name.endswith(".weight") and name.split(".")[-2] in ADAPTED)
    )
    model = copy.deepcopy(base)
    model.load_state_dict({name: fused.state_dict()[adapted_name(name, fused)] for name in model.state_dict()})
    fresh = export(model, CONDITIONED, tmp_path / "fresh.onnx", invariants=("text",))
    for end in ("", ".prologue"):
        swapped = initializers(tmp_path / f"swapped{end}.onnx")
        assert swapped == initializers(tmp_path / f"fresh{end}.onnx")
        assert swapped != initializers(plain.with_name(f"model{end}.onnx"))
    results = outputs(tmp_path / "swapped.onnx", CONDITIONED)
    assert all(map(torch.equal, results, outputs(fresh, CONDITIONED)))
    assert not torch.allclose(results[0], outputs(plain, CONDITIONED)[0], atol=1e-3)


def adapted_name(name: str, model: nn.Module) -> str:
    owner, _, leaf = name.rpartition(".")
    return name if name in model.state_dict() else f"{owner}.base_layer.{leaf}"


def test_the_same_weights_change_nothing_and_a_file_may_be_replaced_in_place(
    base: nn.Module, plain: Path, tmp_path: Path
) -> None:
    assert replace_weights(plain, base.state_dict(), tmp_path / "again.onnx") == ()
    state = {name: value * 1.5 for name, value in base.state_dict().items()}
    assert set(replace_weights(tmp_path / "again.onnx", state)) == set(state)
    assert replace_weights(tmp_path / "again.onnx", state) == ()


def test_an_adapter_that_is_not_fused_is_refused(adapted: nn.Module, plain: Path) -> None:
    with pytest.raises(ConfigError, match="not fused into its weight"):
        replace_weights(plain, adapted)
    alone = {name: value for name, value in adapted.state_dict().items() if "lora_" in name}
    with pytest.raises(ConfigError, match="not fused"):
        replace_weights(plain, alone)


def test_a_state_dict_of_another_model_is_refused(base: nn.Module, plain: Path) -> None:
    state = base.state_dict()
    with pytest.raises(ConfigError, match="there is no weight "):
        replace_weights(plain, {f"model.{name}": value for name, value in state.items()})
    name = next(name for name, value in state.items() if value.dim() == 2)
    with pytest.raises(ConfigError, match="has the shape"):
        replace_weights(plain, {**state, name: torch.zeros(3, 5)})


def test_what_has_no_place_of_its_own_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Peculiar().eval()
    path = export(model, SMALL, tmp_path / "peculiar.onnx")
    before, state = path.read_bytes(), model.state_dict()
    for name, reason in (
        ("scale", "folded into a constant"),
        ("square.weight", "folded into a constant"),  # nobody knows whether it is transposed
        ("first", "share one place"),
        ("second", "share one place"),
    ):
        with pytest.raises(ConfigError, match=reason):
            replace_weights(path, {**state, name: state[name] + 0.5})
    assert path.read_bytes() == before
    twos = torch.full((WIDTH,), 2.0)
    assert replace_weights(path, {**state, "first": twos, "second": twos}) == ("first",)


def test_a_file_that_says_nothing_of_its_weights_is_refused(base: nn.Module, tmp_path: Path) -> None:
    lazy = lazy_compile.transform(base, call(CONDITIONED))
    lazy.policy = Scheduled(CacheSchedule.always_compute(STEPS, len(lazy.branches)))
    export_onnx(lazy, tmp_path / "set", gating="schedule", dynamic=False)
    file = next((tmp_path / "set").glob("mask-*.onnx"))
    with pytest.raises(ArtifactError, match="does not say where its weights lie"):
        replace_weights(file, base)
