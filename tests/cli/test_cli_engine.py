"""``lazy-compile inspect`` of engines and of the logs of builds."""

from __future__ import annotations

from pathlib import Path
from shutil import copyfile
from xml.etree import ElementTree

import pytest

from lazy_compile.backends.tensorrt import build as tensorrt_build
from lazy_compile.backends.tensorrt.api import Message
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.check import EngineStructure
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar
from support.command_line import answer, call, refusal
from support.conditional_models import one_if, written
from support.layer_lists import SOUND, moved, spelled

TINY = "support.factories:tiny_dit"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "tiny.engine"
    answer("build", TINY, "--flavor", "rtx", "--precision", "fp16", "--output", path)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What a builder said, with a list that it has thrown away in front."""
    path = tmp_path / "build.log"
    path.write_text(f"[V] start\n{spelled(moved(SOUND, 'qkv', 'branch'))}\n[V] again\n{spelled(SOUND)}\n[I] done\n")
    return path


def test_an_engine_is_shown_branch_by_branch(engine: Path) -> None:
    result = call("inspect", engine)
    assert result.exit_code == 0, result.output
    for text in ("lazy_branch_0", "lazy_branch_3", "after the last", "before it, at every step", "fused attention"):
        assert text in result.stdout
    assert "4 branches, " in result.stdout
    assert "4 host copies, 1 before the first branch" in result.stdout


def test_everything_stands_in_one_place(engine: Path) -> None:
    values = answer("inspect", engine)["engines"][str(engine)]
    listed = [name for line in values["segments"] for arm in ("every_step", "compute", "reuse") for name in line[arm]]
    layers = EngineSidecar.load(engine).layers
    assert sorted(listed) == sorted(layer.name for layer in layers if layer.kind not in ("jmp", "cjmp"))
    assert [line["branch"] for line in values["segments"]] == [*(f"lazy_branch_{i}" for i in range(4)), None]
    assert values["problems"] == []


def test_the_last_list_of_a_log_is_read(log: Path) -> None:
    values = answer("inspect", log, "--expect", 1)["engines"][str(log)]
    assert (values["branches"], values["heavy_inside"], values["heavy_always"]) == (1, 3, 1)
    line = refusal_of_structure("inspect", log, "--expect", 2)
    assert "build.log is not as lazy as it should be: 1 conditional jumps for 2 branches" in line


def refusal_of_structure(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 7, result.output
    assert "branch" in result.stdout, "the table is shown all the same"
    return result.stderr


def test_the_log_of_a_real_build_says_the_same_as_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Message] = []
    judge = tensorrt_build._structure

    def overhear(messages: list[Message], nodes: dict[str, tuple[str, ...]]) -> EngineStructure:
        heard.extend(messages)
        return judge(messages, nodes)

    monkeypatch.setattr(tensorrt_build, "_structure", overhear)
    built = build_engine(written(tmp_path, one_if()), tmp_path / "m.engine", BuildConfig(flavor="rtx")).structure
    (tmp_path / "build.log").write_text("\n".join(f"[{item.severity[0]}] {item.text}" for item in heard))
    (seen,) = answer("inspect", tmp_path / "build.log", "--expect", 1)["engines"].values()
    assert {name: seen[name] for name in built.summary()} == built.summary()


def test_a_product_outside_its_branch_fails(log: Path, tmp_path: Path) -> None:
    log.write_text(spelled(moved(SOUND, "qkv", "branch").replace("then qkv", "then _gemm_mha_v2")))
    assert "1 heavy kernels of a branch run at every step: q" in refusal_of_structure("inspect", log)
    path = written(tmp_path, one_if(then="a = Relu(p)", before="p = MatMul(x, w)"))
    build_engine(path, tmp_path / "m.engine", BuildConfig(flavor="rtx"))
    line = refusal_of_structure("inspect", tmp_path / "m.engine")
    assert "1 heavy kernels of a branch run at every step: node_of_p; 1 conditionals compute nothing heavy" in line


def test_a_picture_has_a_square_for_each_kernel(engine: Path, tmp_path: Path) -> None:
    call("inspect", engine, "--picture", tmp_path / "engine.svg")
    picture = ElementTree.parse(tmp_path / "engine.svg").getroot()
    squares = [item for item in picture.iter() if item.tag.endswith("rect") and len(item)]
    layers = [layer for layer in EngineSidecar.load(engine).layers if layer.kind not in ("jmp", "cjmp")]
    assert len(squares) == len(layers)
    titles = {item.text for square in squares for item in square}
    assert titles == {f"{layer.kind} {layer.name}" for layer in layers}


def test_what_cannot_be_shown_is_one_line(engine: Path, log: Path, tmp_path: Path) -> None:
    assert "an .svg file of one engine" in refusal(2, "inspect", engine, "--picture", tmp_path / "engine.png")
    assert "are about engines" in refusal(2, "inspect", TINY, "--picture", tmp_path / "engine.svg")
    (tmp_path / "alone.engine").write_bytes(engine.read_bytes())
    assert "has no alone.engine.json beside it" in refusal(5, "inspect", tmp_path / "alone.engine")
    copyfile(engine.with_name("tiny.engine.json"), tmp_path / "alone.engine.json")
    (tmp_path / "alone.engine").write_bytes(engine.read_bytes()[:-1])
    assert "is not the engine that alone.engine.json describes" in refusal(5, "inspect", tmp_path / "alone.engine")
    log.write_text("[I] nothing was built")
    assert "this holds no list of layers" in refusal(5, "inspect", log)
