"""Entries that are damaged, edited or of another model: a capture is made anew, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_folder import CaptureFolder
from lazy_compile.digests import with_digest
from lazy_compile.storage import load_tensors, save_tensors
from support.kept_models import call, kept_capture, run, toy


def entry(folder: Path) -> Path:
    (file,) = folder.glob("*/*.safetensors")
    return file


def edit(file: Path, change: Callable[[Any], None]) -> None:
    """As somebody who knows the form, and writes the digest too."""
    tensors, described = load_tensors(file)
    written = json.loads(described["capture"])
    change(written)
    save_tensors(file, tensors, {"capture": json.dumps(written)})


def calls_another_operator(written: Any) -> None:
    node = next(node for node in written["nodes"] if node[2] == "aten.gelu.default")
    node[2] = "aten.relu.default"


def test_the_entry_of_another_model_is_made_anew(
    folder: Path, exports: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    """Equal in all but an operator: a key that missed something would lead there."""
    edit(entry(folder), calls_another_operator)
    model = toy()
    assert torch.equal(run(kept_capture(model, call(), folder), model, call())[0], model(**call()))
    assert len(exports) == 1
    assert [record.getMessage() for record in caplog.records if "made anew" in record.getMessage()]
    kept_capture(model, call(), folder)
    assert len(exports) == 1  # the entry was replaced


def slightly_off(written: Any) -> None:
    node = next(node for node in written["nodes"] if node[2] == "aten.layer_norm.default")
    node[3]["tuple"][4] = 1.1e-5


def test_what_was_exact_has_to_be_exact(folder: Path, exports: list[object]) -> None:
    edit(entry(folder), slightly_off)
    kept_capture(toy(), call(), folder)
    assert exports


def names(target: str) -> Callable[[Any], None]:
    def change(written: Any) -> None:
        next(node for node in written["nodes"] if node[2] == "aten.gelu.default")[2] = target

    return change


def guards(text: str) -> Callable[[Any], None]:
    return lambda written: written["guards"].append(text)


def sizes(expression: Any) -> Callable[[Any], None]:
    return lambda written: written["sizes"].__setitem__(0, expression)


def called(name: str) -> Callable[[Any], None]:
    return lambda written: written["nodes"][0].__setitem__(1, name)


def returns(spec: str) -> Callable[[Any], None]:
    return lambda written: written.__setitem__("output_spec", spec)


RAN = "__import__('pathlib').Path('ran').touch()"


@pytest.mark.parametrize(
    "change",
    [
        names("aten.from_file.default"),
        names("aten.save.default"),
        names("aten.add_.Tensor"),
        names("image.write_file.default"),
        names("operator.attrgetter"),
        names("builtins.eval"),
        guards(RAN),
        guards("L['tensors'].__class__.__name__ == ''"),
        guards("math.factorial(10 ** 9) > 0"),
        guards("9 ** 9 ** 9 > 0"),
        sizes(RAN),
        sizes(["Pow", 9, 999999999]),
        sizes(["Lambda", 1]),
        called(f"x={RAN}"),
        returns('[1, {"type": "collections.defaultdict", "context": "os.system", "children_spec": []}]'),
        lambda written: written.clear(),
        lambda written: written["nodes"].pop(),
        lambda written: written.update(format=0),
        lambda written: written["constants"].update(dict.fromkeys(written["constants"], "/nowhere")),
    ],
)
def test_an_edited_entry_runs_nothing(
    folder: Path, exports: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    edit(entry(folder), change)
    found = CaptureFolder(folder).entries(toy(), *CallLayout.of((), call()), False)
    assert found.find(lambda capture: pytest.fail("it was read")) is None
    assert len(caplog.records) == 1
    assert not Path("ran").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Evil()))


def pickled_by_torch(file: Path) -> None:
    torch.save(Evil(), file)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"aten.gelu") + 6] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def without_digest(file: Path) -> None:
    tensors, described = load_tensors(file)
    save_file(tensors, file, {"lazy_compile": json.dumps({"metadata": described})})


def with_old_digest(file: Path) -> None:
    tensors, described = load_tensors(file)
    spoilt = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(spoilt, file, {"lazy_compile": json.dumps(with_digest({"metadata": described, "tensors": "0"}))})


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("spoil", [pickled, pickled_by_torch, flipped, cut, without_digest, with_old_digest, a_pipe])
def test_a_damaged_entry_is_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    spoil(entry(folder))
    found = CaptureFolder(folder).entries(toy(), *CallLayout.of((), call()), False)
    assert found.find(lambda capture: pytest.fail("it was read")) is None
    assert len(caplog.records) == 1
    assert not Path("ran").exists()
    for file in folder.glob("*/*"):
        file.unlink()
