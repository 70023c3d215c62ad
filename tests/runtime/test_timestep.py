from __future__ import annotations

import threading

import pytest

from lazy_compile.analysis.timestep_input import find_timestep_input
from lazy_compile.errors import ConfigError
from lazy_compile.runtime.trajectory import MAX_NAMED_STREAMS, MAX_STREAMS, Trajectories, Trajectory, use_stream
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


# Where a call stands ----------------------------------------------------------------------------------------------


def walk(trajectory: Trajectory, times: list[float | None]) -> list[tuple[int, int, bool]]:
    """Step, number of the stream, and whether it starts a trajectory, for each call."""
    result = []
    for time in times:
        state, step, started = trajectory.advance(time)
        number = next(index for index, each in enumerate(trajectory.streams) if each is state)
        result.append((step, number, started))
    return result


def test_another_time_is_the_next_step() -> None:
    assert walk(Trajectory(), [900, 600, 300, 0]) == [(0, 0, True), (1, 0, False), (2, 0, False), (3, 0, False)]


def test_the_same_time_is_the_next_stream_of_the_step() -> None:
    assert walk(Trajectory(), [900, 900, 600, 600, 300]) == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, False),
        (1, 1, False),
        (2, 0, False),
    ]


def test_streams_keep_their_caches_between_steps() -> None:
    trajectory = Trajectory()
    first, _, _ = trajectory.advance(900)
    second, _, _ = trajectory.advance(900)
    assert first is not second
    assert trajectory.advance(600)[0] is first
    assert trajectory.advance(600)[0] is second


def test_a_move_to_the_noisy_end_starts_a_trajectory_with_empty_caches() -> None:
    trajectory = Trajectory()
    old, _, _ = trajectory.advance(900)
    assert walk(trajectory, [500, 100, 900, 500]) == [(1, 0, False), (2, 0, False), (0, 0, True), (1, 0, False)]
    assert all(state is not old for state in trajectory.streams)


def test_trajectories_of_one_step_each_start_anew() -> None:
    trajectory = Trajectory()
    walked = walk(trajectory, [900.0] * (2 * MAX_STREAMS))
    assert [started for _, _, started in walked] == ([True] + [False] * (MAX_STREAMS - 1)) * 2
    assert {step for step, _, _ in walked} == {0}


def test_trajectories_of_two_steps_are_told_apart() -> None:
    assert walk(Trajectory(), [900, 400] * 3) == [(0, 0, True), (1, 0, False)] * 3


def test_rising_time_is_seen_after_two_moves() -> None:
    times = [0.0, 0.25, 0.5, 0.75]
    trajectory = Trajectory()
    assert walk(trajectory, times) == [(0, 0, True), (0, 0, True), (2, 0, False), (3, 0, False)]
    assert walk(trajectory, times) == [(0, 0, True), (1, 0, False), (2, 0, False), (3, 0, False)]


def test_a_model_may_change_its_mind_about_the_direction() -> None:
    trajectory = Trajectory()
    walk(trajectory, [0.0, 0.5, 1.0])
    assert trajectory.direction == 1
    walk(trajectory, [1.0, 0.8, 0.6, 0.4])
    assert trajectory.direction == -1


def test_two_restarts_in_a_row_are_not_rising_time() -> None:
    walked = walk(Trajectory(), [300, 500, 400, 600, 500])
    assert [started for _, _, started in walked] == [True, True, False, True, False]


def test_two_rising_steps_never_look_like_falling_ones() -> None:
    walked = walk(Trajectory(), [0.0, 0.5] * 4)
    assert all(started for _, _, started in walked)


def test_two_falling_steps_are_followed_behind_a_single_call_at_another_time() -> None:
    assert walk(Trajectory(), [1.0, *[900, 400] * 2]) == [(0, 0, True), *[(0, 0, True), (1, 0, False)] * 2]


def test_without_time_every_call_is_a_step() -> None:
    trajectory = Trajectory()
    assert walk(trajectory, [None, None, None]) == [(0, 0, True), (1, 0, False), (2, 0, False)]
    trajectory.reset()
    assert walk(trajectory, [None]) == [(0, 0, True)]


def test_reset_forgets_everything_but_the_direction() -> None:
    trajectory = Trajectory()
    walk(trajectory, [0.0, 0.5, 1.0])
    trajectory.reset()
    assert trajectory.streams == []
    assert walk(trajectory, [0.0, 0.5]) == [(0, 0, True), (1, 0, False)]


def test_each_name_and_each_thread_has_a_trajectory_of_its_own() -> None:
    trajectories = Trajectories()
    main = trajectories.current()
    with use_stream("other"):
        other = trajectories.current()
        with use_stream("inner"):
            assert trajectories.current() is not other
        assert trajectories.current() is other
    assert trajectories.current() is main is not other
    elsewhere: list[Trajectory] = []
    thread = threading.Thread(target=lambda: elsewhere.append(trajectories.current()))
    thread.start()
    thread.join()
    assert elsewhere[0] is not main


def test_reset_reaches_every_stream_of_the_thread() -> None:
    trajectories = Trajectories()
    for name in ("", "other"):
        with use_stream(name):
            trajectories.current().advance(900)
    trajectories.reset()
    for name in ("", "other"):
        with use_stream(name):
            assert trajectories.current().streams == []
    assert trajectories.bytes == 0


def walk_in(trajectories: Trajectories, name: str) -> int:
    """The step of the next call in a stream of this name."""
    with use_stream(name):
        return trajectories.advance(None)[1]


def test_reset_of_one_stream_leaves_the_others() -> None:
    trajectories = Trajectories()
    assert [walk_in(trajectories, name) for name in ("a", "b", "a", "b")] == [0, 0, 1, 1]
    trajectories.reset("a")
    assert [walk_in(trajectories, name) for name in ("a", "b")] == [0, 2]


def test_only_so_many_named_streams_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    trajectories = Trajectories()
    walk_in(trajectories, "")
    names = [f"request {number}" for number in range(MAX_NAMED_STREAMS)]
    for name in names:
        walk_in(trajectories, name)
    assert (walk_in(trajectories, names[0]), caplog.messages) == (1, [])
    walk_in(trajectories, "one more")
    assert "the caches of 'request 1' were dropped" in caplog.text
    assert [walk_in(trajectories, name) for name in ("", names[0], names[2])] == [1, 2, 1]
    assert walk_in(trajectories, names[1]) == 0


def test_reset_reaches_other_threads_where_that_is_asked_for() -> None:
    trajectories = Trajectories()
    steps, wait, go = [], threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def work() -> None:
        for _ in range(3):
            steps.append(walk_in(trajectories, ""))
            wait.wait()
            go.wait()

    thread = threading.Thread(target=work)
    thread.start()
    for options in ({}, {"every_thread": True}, {}):
        wait.wait()
        trajectories.reset(**options)
        go.wait()
    thread.join()
    assert steps == [0, 1, 0]
