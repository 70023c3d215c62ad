"""Exported models in OpenVINO, run by ``make test-openvino``: an ``If`` runs one arm there as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lazy_compile import AlwaysCompute, CacheSchedule, LazyModule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.errors import ArtifactError
from support.toy_models import TOYS, trajectory

pytestmark = [pytest.mark.openvino, pytest.mark.filterwarnings("ignore")]

STEPS = 6
Exported = Callable[[str, str], tuple[LazyModule, Path, Any]]


@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize("toy", ["dit", "mmdit"])
def test_it_does_what_onnx_runtime_does(exported: Exported, toy: str, reuse: str) -> None:
    from lazy_compile.backends.openvino.runner import OpenVinoRunner

    lazy, path, _ = exported(toy, reuse)
    engines = [EngineDenoiser(OpenVinoRunner(path, threads=1)), EngineDenoiser(OnnxRunner(path))]
    calls = trajectory(TOYS[toy], steps=STEPS)
    for policy in (AlwaysCompute(), Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))):
        results = []
        for engine in engines:
            engine.policy = policy
            engine.reset_stats()
            results.append(torch.stack([engine(**call).clone() for call in calls]))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert engines[0].stats.lazy_ratio == 0.5
    with torch.no_grad():
        dense = torch.stack([lazy.original(**call) for call in calls])
    assert not torch.allclose(results[0], dense, atol=1e-3)


def test_two_requests_do_not_mix(exported: Exported) -> None:
    from lazy_compile.backends.openvino.runner import OpenVinoRunner

    lazy, path, _ = exported("dit", "linear")
    engine = EngineDenoiser(OpenVinoRunner(path, threads=1))
    engine.policy = Scheduled(CacheSchedule.every(2, STEPS, len(lazy.branches)))
    requests = [trajectory(TOYS["dit"], steps=STEPS, seed=seed) for seed in (1, 2)]
    alone = [[engine(**call).clone() for call in calls] for calls in requests]
    engine.reset()
    together = [[engine(**call).clone() for call in pair] for pair in zip(*requests, strict=True)]
    for number in (0, 1):
        assert all(torch.equal(step[number], one) for step, one in zip(together, alone[number], strict=True))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    from lazy_compile.backends.openvino.runner import OpenVinoRunner

    with pytest.raises(ArtifactError, match="there is no file"):
        OpenVinoRunner(tmp_path / "nothing.onnx")
