"""Published models without their weights: what the graph says they cost is what torch counts on the original."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lazy_compile.bench import full_size
from lazy_compile.bench.full_size import FullSizeRow
from lazy_compile.bench.full_size_models import FULL_SIZE
from lazy_compile.bench.full_size_plans import SETTINGS, PlanRow, PlanSetting, measure_plan, plan_lines

RESULTS = Path(__file__).parents[2] / "docs" / "results"

PARAMETERS = {  # billions, as their authors state them
    "DiT-XL/2": 0.75, "Large-DiT-7B": 7.3, "PixArt-Sigma": 0.61, "Sana-1.6B": 1.6, "SD3.5-Large": 8.1,
    "FLUX.1-dev": 11.9, "Wan2.1-T2V-14B": 14.3, "HunyuanVideo": 12.8,
}  # fmt: skip


@pytest.mark.slow
def test_a_model_of_full_width_is_transformed_without_its_weights() -> None:
    name, few = "Large-DiT-7B", {"layers": 2}
    row = full_size.measure(name, **few)
    assert row.branches == {"self_attention": 2, "mlp": 2}
    assert row.macs == pytest.approx(row.counted_macs, rel=1e-3)
    assert row.cache_linear == 2 * row.cache_last == 2 * sum(size for *_, size in row.table)
    model, inputs = FULL_SIZE[name].build(**few)
    tensors = [*model.parameters(), *(value for value in inputs.values() if isinstance(value, torch.Tensor))]
    assert all(tensor.is_meta for tensor in tensors)
    page = full_size.page([row])
    assert f"| {name} | {row.setting} |" in page
    assert "+0.00%" in page
    json.dumps(asdict(row))


@pytest.mark.slow
def test_a_plan_of_a_model_of_full_width_is_simulated() -> None:
    few = {"num_layers": 1, "num_single_layers": 2}
    names: list[str] = []

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        names.append(note)

    row = measure_plan(PlanSetting("FLUX.1-dev", 2, 4, guided=True), on_progress, **few)
    stream = 2 * (4096 + 512) * 3072  # bytes of the tokens of image and text
    assert row.decisions == 2
    assert row.fits
    assert row.keep == "device"
    assert 2 * 4 * row.decisions * stream <= row.device_bytes <= row.estimated_device_bytes
    assert max(row.phases.values()) == row.device_bytes
    assert names == list(row.phases)
    assert f"| 4, guided | 2 | 2 | {row.weight_bytes / 1e9:.1f} GB | device |" in "\n".join(plan_lines([row]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_model_is_transformed_in_time_and_in_little_memory(name: str) -> None:
    (row,), _ = full_size.run(models=[name], plans=False)
    assert row.parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.02)
    assert row.macs == pytest.approx(row.counted_macs, rel=0.01)
    assert row.share_in_branches > 0.95
    assert row.transform_cpu_seconds < 90
    assert row.pass_seconds["discover_branches"] < 2
    assert row.resident_bytes < 4 * 2**30


def committed() -> tuple[list[FullSizeRow], list[PlanRow]]:
    found = json.loads((RESULTS / "full_size.json").read_text())
    return [FullSizeRow(**row) for row in found["rows"]], [PlanRow(**row) for row in found["plans"]]


def test_the_committed_figures_are_of_every_model() -> None:
    rows, plans = committed()
    assert [row.model for row in rows] == list(FULL_SIZE)
    assert [(plan.model, plan.granularity, plan.steps, plan.guided) for plan in plans] == [
        (setting.model, str(setting.granularity), setting.steps, setting.guided) for setting in SETTINGS
    ]
    assert (RESULTS / "full_size.md").read_text() == full_size.page(rows, plans)


def test_plans_of_large_models_fit_as_committed_and_take_no_more_than_was_said() -> None:
    for plan in committed()[1]:
        assert plan.weight_bytes + plan.device_bytes < 80e9
        assert plan.host_bytes < 128e9
        assert plan.device_bytes <= plan.estimated_device_bytes
        assert plan.host_bytes <= plan.estimated_host_bytes
        assert plan.disk_bytes <= plan.estimated_disk_bytes


def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, plans = committed()
    measured: list[str] = []

    def model(name: str) -> FullSizeRow:
        measured.append(name)
        return next(row for row in rows if row.model == name)

    def plan(setting: PlanSetting, on_progress: object) -> PlanRow:
        measured.append(f"plan of {setting.model}")
        return next(row for row in plans if row.model == setting.model)

    monkeypatch.setattr(full_size, "_measure_apart", model)
    monkeypatch.setattr(full_size, "measure_plan", plan)
    full_size.run(tmp_path, models=["FLUX.1-dev"], plans=False)
    assert measured == ["FLUX.1-dev"]
    for _ in range(2):
        full_size.run(tmp_path, models=["FLUX.1-dev", "DiT-XL/2"])
    assert measured == ["FLUX.1-dev", "DiT-XL/2", "plan of FLUX.1-dev"]
    found = json.loads((tmp_path / "full_size.json").read_text())
    assert [len(found["rows"]), len(found["plans"])] == [2, 1]
    assert "| FLUX.1-dev | 1024 px | 28 | branch |" in (tmp_path / "full_size.md").read_text()
