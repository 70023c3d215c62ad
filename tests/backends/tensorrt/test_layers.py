"""Reading a builder's layer list, and judging where its kernels stand: on lists that are written out here."""

from __future__ import annotations

import json

import pytest

from lazy_compile.backends.tensorrt.check import check_branches
from lazy_compile.backends.tensorrt.layers import EngineLayer, parse_layers
from lazy_compile.errors import ArtifactError
from support.layer_lists import SOUND, moved, spelled, without

NODES = {"If_0": ("q", "out"), "": ("final",)}


def test_a_layer_is_read() -> None:
    layers = parse_layers(spelled(SOUND))
    assert layers[3] == EngineLayer("qkv", "gemm", ("z",), ("q",), "qkv_0x12", ("q",))
    assert layers[2] == EngineLayer(
        "branch", "cjmp", ("c_host",), (), "branch_0x12", ("If_0",), then_target="qkv", else_target="move"
    )
    assert [layer.target for layer in layers if layer.kind == "jmp"] == ["add", "add"]


def test_what_an_inspector_returns_reads_the_same() -> None:
    layer = {
        "Name": "qkv", "LayerType": "gemm", "TacticName": "qkv_0x12", "StreamId": 0,
        "Inputs": [{"Name": "z", "Dimensions": [2, 8]}], "Outputs": [{"Name": "q", "Dimensions": [2, 8]}],
        "Metadata": "[ONNX Layer: q]",
    }  # fmt: skip
    assert parse_layers(json.dumps({"Layers": [layer], "I/O Tensors": []})) == parse_layers(spelled(SOUND))[3:4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "this holds no list of layers; expected the VERBOSE log of a build with detailed profiling"),
        ('{"Layers": ["qkv"]}', "knows only the names of its layers; build it with detailed profiling"),
        ('{"Layers": [', "cannot read the JSON of an engine inspector"),
    ],
)
def test_what_is_no_layer_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_layers(text)


def test_a_list_that_is_cut_off_is_refused() -> None:
    with pytest.raises(ArtifactError, match="the layer list is cut off: 'branch' jumps to 'move', which is not in it"):
        check_branches(parse_layers(spelled(without(SOUND, "move")[0])))


@pytest.mark.parametrize(
    ("kind", "name", "heavy"),
    [
        ("gemm", "node_MatMul_3_myl0_7", True),
        ("correlation", "node_conv2d_myl0_9", True),
        ("CaskConvolution", "conv1", True),
        ("runtime_fusion", "__myl_FcAddSilu_myl0_2", True),
        ("kgen", "_gemm_mha_v2_myl0_31", True),
        ("kgen", "__myl_ReshMulSinCosConc_myl0_1", False),
        ("kgen", "__myl_Move_myl0_8", False),
        ("copy", "copy_d2h_conv_gemm", False),
        ("memset", "hc_init", False),
    ],
)
def test_heavy_kernels(kind: str, name: str, heavy: bool) -> None:
    assert EngineLayer(name, kind).is_heavy == heavy


def test_a_sound_engine() -> None:
    found = check_branches(parse_layers(spelled(SOUND)), 1, NODES)
    assert found.problems == ()
    (branch,) = found.branches
    assert [layer.name for layer in branch.compute] == ["qkv", "_gemm_mha_v2", "out"]
    assert [layer.name for layer in branch.reuse] == ["move"]
    assert [layer.name for layer in found.always_on] == ["norm", "copy_d2h_c", "add", "final"]
    assert (branch.name, found.heavy_inside, found.heavy_always, found.fused_attention) == ("If_0", 3, 1, 1)
    assert (found.host_copies, found.host_copies_before_first_branch) == (1, 1)


def test_a_missing_jump_is_seen() -> None:
    layers = [layer for layer in parse_layers(spelled(SOUND)) if layer.kind not in ("cjmp", "jmp")]
    assert check_branches(layers, 1).problems == ("0 conditional jumps for 1 branches",)


@pytest.mark.parametrize("nodes", [NODES, None])
def test_a_product_before_its_branch_is_seen(nodes: dict[str, tuple[str, ...]] | None) -> None:
    table = moved(SOUND, "qkv", "branch").replace("then qkv", "then _gemm_mha_v2")
    found = check_branches(parse_layers(spelled(table)), 1, nodes)
    assert found.problems == ("1 heavy kernels of a branch run at every step: q",)


def test_a_product_that_others_read_too_is_seen_by_its_name() -> None:
    table = moved(SOUND, "qkv", "branch").replace("then qkv", "then _gemm_mha_v2").replace("o x ", "o q ")
    assert check_branches(parse_layers(spelled(table)), 1, NODES).problems
    assert not check_branches(parse_layers(spelled(table)), 1).problems


def test_a_product_without_a_name_is_seen_by_what_reads_it() -> None:
    table = moved(SOUND, "qkv", "branch").replace("then qkv", "then _gemm_mha_v2").replace("[q]", "")
    assert check_branches(parse_layers(spelled(table)), 1, NODES).problems


def test_a_product_in_the_other_arm_is_seen() -> None:
    found = check_branches(parse_layers(spelled(moved(SOUND, "out", "end_of_else"))), 1, NODES)
    assert found.problems == ("1 heavy kernels run while a branch is reused: out",)


def test_an_arm_that_computes_nothing_is_seen() -> None:
    table = SOUND.replace("then qkv else move", "then move else qkv")
    problems = check_branches(parse_layers(spelled(table)), 1, NODES).problems
    assert problems[0].startswith("3 heavy kernels run while a branch is reused")
    assert problems[1] == "1 conditionals compute nothing heavy: If_0"


def test_a_product_in_another_branch_is_seen() -> None:
    found = check_branches(parse_layers(spelled(SOUND)), 1, {"If_0": ("q",), "If_1": ("out",), "": ("final",)})
    assert found.problems == ("1 heavy kernels stand in another branch than their nodes: out",)
