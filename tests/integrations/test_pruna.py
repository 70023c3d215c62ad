"""The cacher of ``examples/pruna``, run by ``make test-pruna``: pip finds no set of packages with Pruna."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.integrations.diffusers_pipeline import LazyDenoiser
from support.diffusers_pipelines import STEPS, Case, dit

pytestmark = [pytest.mark.pruna, pytest.mark.filterwarnings("ignore")]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pruna"


@pytest.fixture(scope="module")
def pruna() -> Any:
    """With the cacher registered, no telemetry, and a torchvision of names alone.

    Pruna's handlers of images import torchvision, and PyPI's does not load beside a torch without CUDA. Packages that
    use it where they find it are imported before.
    """
    patch = pytest.MonkeyPatch()
    patch.setenv("PRUNA_METRICS_ENABLED", "false")
    patch.syspath_prepend(EXAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("transformers.models.auto.processing_auto", "diffusers", "pytorch_lightning"):
            importlib.import_module(name)
        for name in ("torchvision", "torchvision.transforms"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            patch.setitem(sys.modules, name, module)
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms"].Compose = object  # type: ignore[attr-defined]
        found = importlib.import_module("pruna")
        importlib.import_module("pruna_lazy_compile")
    yield found
    patch.undo()


def sample(smashed: Any, case: Case) -> Tensor:
    return Case(smashed, case.arguments).sample()


@pytest.mark.parametrize(("interval", "reuse"), [(1, "last"), (2, "linear")])
def test_a_smashed_pipeline_is_lazy_and_survives_a_file(pruna: Any, interval: int, reuse: str, tmp_path: Path) -> None:
    case = dit()
    dense = case.sample()
    config = pruna.SmashConfig({"lazy_compile": {"interval": interval, "reuse": reuse}}, device="cpu")
    smashed = pruna.smash(case.pipe, config)
    samples, lazy = sample(smashed, case), smashed.transformer
    assert isinstance(lazy, LazyDenoiser)
    assert lazy.lazy_config.reuse == reuse
    assert torch.equal(samples, dense) == (interval == 1)
    assert lazy.stats.lazy_ratio == 1 - 1 / interval
    smashed.save_pretrained(tmp_path)
    again = pruna.PrunaModel.from_pretrained(tmp_path)
    assert torch.equal(sample(again, case), samples)
    assert again.transformer.stats.lazy_ratio == lazy.stats.lazy_ratio


def test_a_schedule_is_set_on_what_was_smashed(pruna: Any) -> None:
    case = dit()
    smashed = pruna.smash(case.pipe, pruna.SmashConfig(["lazy_compile"], device="cpu"))
    sample(smashed, case)
    lazy = smashed.transformer
    lazy.policy = Scheduled(CacheSchedule.every(3, STEPS, len(lazy.branches)))
    lazy.reset_stats()
    sample(smashed, case)
    assert lazy.stats.lazy_ratio == pytest.approx(2 / 3)


def test_a_model_that_is_no_pipeline_is_refused(pruna: Any) -> None:
    with pytest.raises(ValueError, match="lazy_compile"):
        pruna.smash(torch.nn.Linear(2, 2), pruna.SmashConfig(["lazy_compile"], device="cpu"))
