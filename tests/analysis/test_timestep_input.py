"""Which input of a model is the denoising time."""

from __future__ import annotations

import pytest

from lazy_compile.analysis.timestep_input import find_timestep_input
from lazy_compile.errors import ConfigError
from support.graph_text import program
from support.toy_models import TOYS

TIMES = """
    x: f32[B, N, 8]
    label: i64[B]
    guidance: f32[B]
    {}
    w: param f32[8, 8]
"""
SINUSOID = """
    a{0} = unsqueeze({0}, 1)
    m{0} = mul.Tensor(a{0}, 0.5)
    s{0} = sin(m{0})
"""


def find(inputs: str, body: str, wanted: str | None = None) -> str | None:
    found = program(TIMES.format(inputs) + body + "    y = linear(x, w)\n    return y")
    position = find_timestep_input(found, wanted)
    users = [item.name for item in found.inputs if item.role.value == "user"]
    return None if position is None else users[position]


# Which input is the time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["f32[]", "f32[B]", "i64[B]", "f32[B, 1]", "f32[B, 1, 1, 1]"])
def test_what_a_sinusoid_reads_is_the_time_whatever_its_name_and_shape(shape: str) -> None:
    body = "    f = flatten.using_ints(noise)\n" + SINUSOID.format("f")
    assert find(f"noise: {shape}", body) == "noise"


def test_among_several_that_are_embedded_the_name_decides() -> None:
    body = SINUSOID.format("guidance") + SINUSOID.format("timestep")
    assert find("timestep: f32[B]", body) == "timestep"
    body = SINUSOID.format("guidance") + SINUSOID.format("strength")
    assert find("strength: f32[B]", body) == "guidance"  # no name says more: the first


def test_without_a_sinusoid_the_name_decides() -> None:
    assert find("sigma: f32[B]", "    a = log(sigma)\n") == "sigma"


@pytest.mark.parametrize("name", ["step", "times", "diffusion_steps"])
def test_other_names_of_the_time_are_known(name: str) -> None:
    assert find(f"{name}: i64[B]", "") == name


@pytest.mark.parametrize("lookup", ["index.Tensor(table, [d])", "embedding(table, d)", "index_select(table, 0, depth)"])
def test_what_picks_a_line_of_a_table_is_the_time_unless_the_table_is_trained(lookup: str) -> None:
    body = f"    d = unsqueeze(depth, 1)\n    e = {lookup}\n"
    assert find("depth: i64[B]\n    table: buffer f32[50, 8]", body) == "depth"
    assert find("depth: i64[B]\n    table: param f32[50, 8]", body) is None


def test_a_large_tensor_is_no_time() -> None:
    assert find("rows: f32[B, 8]", SINUSOID.format("rows")) is None
    assert find("t: f32[B, 8]", "") is None
    assert find("positions: f32[N, 3]", "") is None


def test_a_time_for_each_frame_is_known_by_its_name() -> None:
    assert find("rows: f32[N, 3]\n    timestep: f32[B, 8]", SINUSOID.format("rows") + SINUSOID.format("timestep")) == (
        "timestep"
    )


def test_a_sinusoid_behind_a_linear_layer_is_no_embedding_of_time() -> None:
    assert find("v: f32[8]", "    u = linear(v, w)\n    c = sin(u)\n") is None


@pytest.mark.parametrize("product", ["linear(a, k)", "linear(a, k, v)", "mm(a, j)", "addmm(v, a, j)"])
def test_learned_frequencies_are_a_linear_layer_of_single_numbers(product: str) -> None:
    inputs = "noise: f32[B]\n    k: param f32[8, 1]\n    j: param f32[1, 8]\n    v: param f32[8]"
    body = f"    a = unsqueeze(noise, 1)\n    f = {product}\n    g = mul.Tensor(f, 6.28)\n    c = cos(g)\n"
    assert find(inputs, body) == "noise"


def test_a_name_that_is_given_is_taken() -> None:
    assert find("strength: f32[B]", SINUSOID.format("guidance"), wanted="strength") == "strength"


def test_a_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        find("strength: f32[B]", "", wanted="timestep")
    assert str(caught.value) == (
        "timestep_input is 'timestep'; the tensor inputs of this model are x, label, guidance, strength"
    )


@pytest.mark.parametrize("toy", TOYS)
def test_the_time_of_every_toy_is_found(toy: str, captured) -> None:
    found = captured(toy)
    position = find_timestep_input(found, None)
    users = [item.name for item in found.inputs if item.role.value == "user"]
    assert users == list(TOYS[toy].shapes)
    assert (None if position is None else users[position]) == TOYS[toy].time
