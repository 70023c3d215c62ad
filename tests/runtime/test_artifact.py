"""An artefact is read as it was written, or refused in one line; a save never leaves half of one behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, GateTable, LazyModule, Learned, Policy, Scheduled
from lazy_compile.digests import with_digest
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.policies.policy import GateQuery
from lazy_compile.runtime.artifact import MANIFEST, fingerprint, read
from support.factories import TinyDiT, euler, larger_dit, reads_its_mask, tiny_dit, tiny_inputs, tiny_model

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    model, inputs = tiny_dit()
    return lazy_compile.transform(model, inputs, reuse="last", max_reuse_age=3)


def gates(lazy: LazyModule, seed: int = 0) -> GateTable:
    table = GateTable.constant(lazy.branches, torch.tensor([1000.0, 500.0, 0.0]))
    generator = torch.Generator().manual_seed(seed)
    return GateTable(
        table.features,
        table.knots,
        torch.randn(table.weight.shape, generator=generator),
        torch.randn(table.bias.shape, generator=generator),
        "linear",
        torch.rand(table.bias.shape, generator=generator),
    )


@pytest.fixture
def saved(lazy: LazyModule, tmp_path: Path) -> Path:
    lazy.policy = Learned(gates(lazy), shift=0.25)
    lazy.save(tmp_path / "artefact")
    return tmp_path / "artefact"


def edit(folder: Path, change: Edit) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(with_digest(values)))


def gate_file(folder: Path) -> Path:
    (file,) = folder.glob("gates.*.safetensors")
    return file


def with_slopes(schedule: CacheSchedule) -> CacheSchedule:
    return CacheSchedule(schedule.should_compute, np.full(schedule.should_compute.shape, 0.5))


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(ArtifactError) as error:
        lazy_compile.load(folder, model or tiny_model())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "policy_of",
    [
        lambda lazy: AlwaysCompute(),
        lambda lazy: Scheduled(CacheSchedule.random(0.5, 5, len(lazy.branches), seed=1)),
        lambda lazy: Scheduled(with_slopes(CacheSchedule.random(0.5, 5, len(lazy.branches), seed=1))),
        lambda lazy: Learned(gates(lazy), shift=-0.5),
    ],
    ids=["always compute", "scheduled", "with slopes", "learned"],
)
def test_loaded_model_decides_and_samples_as_the_saved_one(
    lazy: LazyModule, tmp_path: Path, policy_of: Callable[[LazyModule], Policy]
) -> None:
    lazy.policy = policy_of(lazy)
    lazy.save(tmp_path)
    again = lazy_compile.load(tmp_path, tiny_model(), tiny_inputs())
    assert again.lazy_config == lazy.lazy_config
    assert type(again.policy) is type(lazy.policy)
    for model in (lazy, again):
        model.reset()
        model.reset_stats()
    assert torch.equal(euler()(again, 3), euler()(lazy, 3))
    assert (again.stats.reuse_table == lazy.stats.reuse_table).all()


def test_gates_come_back_bit_for_bit(saved: Path, lazy: LazyModule) -> None:
    policy = read(saved).policy
    assert isinstance(policy, Learned)
    expected = gates(lazy)
    assert torch.equal(policy.table.weight, expected.weight)
    assert torch.equal(policy.table.bias, expected.bias)
    assert torch.equal(policy.table.slope, expected.slope)
    assert policy.table.knots.dtype == torch.float64
    assert (policy.shift, policy.table.interpolation) == (0.25, "linear")


def test_a_model_can_be_loaded_before_it_is_captured(saved: Path) -> None:
    again = lazy_compile.load(saved, tiny_model())
    assert torch.isfinite(euler()(again, 0)).all()


def test_it_says_how_the_graph_was_obtained(saved: Path, tmp_path: Path) -> None:
    assert (read(saved).capture, read(saved).attempts, read(saved).guarded_inputs) == ("export, dynamic sizes", (), ())
    lazy_compile.transform(*reads_its_mask()).save(tmp_path / "guarded")
    artefact = read(tmp_path / "guarded")
    assert artefact.capture == "export, dynamic sizes, guarded values"
    assert [attempt.partition(": ")[0] for attempt in artefact.attempts] == [
        "export, dynamic sizes",
        "strict export, dynamic sizes",
    ]
    assert artefact.guarded_inputs == ("mask",)


def test_fingerprint_knows_names_and_shapes_but_neither_class_nor_weights() -> None:
    class Renamed(TinyDiT):
        pass

    assert fingerprint(Renamed()) == fingerprint(tiny_model())
    assert fingerprint(TinyDiT(blocks=3)) != fingerprint(tiny_model())


def test_saving_needs_a_captured_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not captured yet"):
        lazy_compile.transform(tiny_model()).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Coin(Policy):
    def __init__(self, side: str) -> None:
        self.side = side

    def should_compute(self, query: GateQuery) -> bool:
        return True


def test_a_policy_that_does_not_say_how_it_is_written_is_not_saved(lazy: LazyModule, tmp_path: Path) -> None:
    lazy.policy = Coin("heads")
    with pytest.raises(ConfigError) as caught:
        lazy.save(tmp_path)
    assert str(caught.value) == (
        "a policy of class Coin cannot be written to a file; make it a dataclass, or define to_dict() and from_dict() "
        "in it"
    )
    assert list(tmp_path.iterdir()) == []


def test_gates_of_the_last_format_are_read(saved: Path, lazy: LazyModule) -> None:
    def to_format_3(values: dict[str, Any]) -> None:
        values["format"] = 3
        del values["policy"]["features"]

    edit(saved, to_format_3)
    policy = read(saved).policy
    assert isinstance(policy, Learned)
    assert policy.table.features == gates(lazy).features


def test_saving_again_keeps_one_set_of_gates_and_the_users_files(saved: Path, lazy: LazyModule) -> None:
    (saved / "notes.txt").write_text("mine")
    lazy.policy = Learned(gates(lazy, seed=1))
    lazy.save(saved)
    assert sorted(file.name for file in saved.iterdir()) == [gate_file(saved).name, MANIFEST, "notes.txt"]


def test_interrupted_save_leaves_the_old_artefact(
    saved: Path, lazy: LazyModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    lazy.policy = Learned(gates(lazy, seed=1))
    monkeypatch.setattr("lazy_compile.runtime.artifact.save_sealed_json", killed)
    with pytest.raises(KeyboardInterrupt):
        lazy.save(saved)
    policy = read(saved).policy
    assert isinstance(policy, Learned)
    assert torch.equal(policy.table.weight, gates(lazy, seed=0).weight)


def test_full_disk_leaves_nothing_under_a_final_name(
    lazy: LazyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    lazy.policy = Learned(gates(lazy))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        lazy.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_artefact_of_another_model_is_refused(saved: Path) -> None:
    assert "was made for another model: it has fingerprint" in refusal(saved, larger_dit()[0])


def test_artefact_with_other_branches_is_refused(saved: Path) -> None:
    edit(saved, lambda values: values["branches"][1].update(kind="conv"))
    with pytest.raises(ArtifactError, match=r"its branch 'blocks\.0#2' is conv .* here stands .* mlp"):
        lazy_compile.load(saved, tiny_model(), tiny_inputs())


def test_artefact_with_fewer_branches_is_refused(lazy: LazyModule, tmp_path: Path) -> None:
    lazy.policy = AlwaysCompute()
    lazy.save(tmp_path)
    edit(tmp_path, lambda values: values["branches"].pop())
    with pytest.raises(ArtifactError, match="it has 3 branches, this one 4; calibrate again"):
        lazy_compile.load(tmp_path, tiny_model(), tiny_inputs())


def set_policy(**values: Any) -> Edit:
    return lambda manifest: manifest.update(policy=values)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v.update(format=99), "has format 99, this release reads 4"),
        (lambda v: v.pop("format"), "has format None"),
        (lambda v: v.pop("branches"), "lacks 'branches'"),
        (lambda v: v.update(colour="red"), "has an unknown key 'colour'"),
        (lambda v: v.update(branches={}), "branches is {}, expected list"),
        (lambda v: v["branches"].__setitem__(0, 7), "branches[0] is 7, expected an object"),
        (lambda v: v["branches"][0].update(gate_features="many"), "branches[0].gate_features is 'many', expected int"),
        (lambda v: v["model"].pop("fingerprint"), "lacks 'model.fingerprint'"),
        (lambda v: v["model"].update(fingerprint="0" * 64), "was made for another model"),
        (lambda v: v["config"].update(warmup_steps="two"), "config.warmup_steps is 'two', expected int"),
        (lambda v: v["config"].update(warmup_steps=True), "config.warmup_steps is True, expected int"),
        (lambda v: v["config"].update(warmup_steps=0), "warmup_steps is 0; at least 1 step must compute"),
        (
            lambda v: v["config"].update(reuse="twice"),
            "config.reuse is 'twice', expected Literal['last', 'linear', 'taylor']",
        ),
        (lambda v: v["config"].pop("reuse"), "lacks 'config.reuse'"),
        (
            set_policy(kind="oracle"),
            "names the policy 'oracle'; expected one of always_compute, scheduled, learned, every",
        ),
        (set_policy(), "names the policy None"),
        (set_policy(kind="scheduled"), "lacks 'policy.should_compute'"),
        (
            set_policy(kind="scheduled", should_compute=[[1, 1]], slopes=None),
            "the schedule has 2 branches, the model has 4",
        ),
        (set_policy(kind="scheduled", should_compute=[["yes"] * 4], slopes=None), "is not a table of 0 and 1"),
        (
            set_policy(kind="scheduled", should_compute=[[0] * 4], slopes=None),
            "the first step of a schedule must compute",
        ),
        (
            set_policy(kind="scheduled", should_compute=[[1] * 4], slopes=[["a"] * 4]),
            "policy.slopes is not a table of num",
        ),
        (
            set_policy(kind="scheduled", should_compute=[[1] * 4], slopes=[[1.0]]),
            "do not fit a schedule of shape (1, 4)",
        ),
        (lambda v: v["policy"].update(interpolation="cubic"), "interpolation is 'cubic'"),
        (lambda v: v["policy"].update(shift="up"), "policy.shift is 'up', expected float"),
        (lambda v: v["policy"].update(gates="gates.0.safetensors"), "gates.0.safetensors"),
        (lambda v: v["branches"][0].update(gate_features=15), "the gate table is for 4 branches with 64 features"),
        (lambda v: v["branches"][0].update(kind="head"), "branches[0].kind is 'head'"),
        (lambda v: v["policy"].update(features=[1]), "a gate table for 1 branches"),
        (lambda v: v["policy"].pop("gates"), "the gates hold no tensor 'bias'"),
        (lambda v: v["policy"].update(gates=7), "cannot read"),
        (set_policy(kind="every_nth", warmup=0, interval=2), "warmup is 0; expected a number of calls"),
        (set_policy(kind="every_nth", warmup=2), "EveryNth cannot be made of warmup"),
        (set_policy(kind="always_compute", warmup=2), "AlwaysCompute cannot be made of warmup"),
    ],
)
def test_edited_json_is_refused_with_what_was_expected(saved: Path, change: Edit, complaint: str) -> None:
    edit(saved, change)
    assert complaint in refusal(saved)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "\x00\x01"])
def test_manifest_that_is_not_a_json_object_is_refused(saved: Path, text: str) -> None:
    (saved / MANIFEST).write_text(text)
    assert MANIFEST in refusal(saved)


def test_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no lazy.json; expected a folder that calibrate, plan or save() wrote"
    )


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_gates_are_refused(saved: Path, length: int) -> None:
    file = gate_file(saved)
    file.write_bytes(file.read_bytes()[:length])
    assert str(file) in refusal(saved)


def test_missing_gates_are_refused(saved: Path) -> None:
    gate_file(saved).unlink()
    assert "cannot read" in refusal(saved)


def test_changed_gates_are_refused(saved: Path) -> None:
    file = gate_file(saved)
    tensors: dict[str, Tensor] = load_file(file)
    tensors["bias"][0, 0] += 1
    save_file(tensors, file)
    assert "its content does not match its name" in refusal(saved)


def test_gates_outside_the_folder_are_not_read(saved: Path) -> None:
    elsewhere = saved.parent / gate_file(saved).name
    gate_file(saved).rename(elsewhere)
    edit(saved, lambda values: values["policy"].update(gates=str(elsewhere)))
    assert "cannot read" in refusal(saved)


def test_files_can_be_read_by_whom_the_umask_allows(saved: Path) -> None:
    (saved / "plain").touch()
    modes = {file.stat().st_mode for file in saved.iterdir()}
    assert len(modes) == 1
