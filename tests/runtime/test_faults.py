"""What goes wrong within a trajectory, and what the next step makes of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.runtime.model_call import ModelCall
from support.hoisting import CONDITIONED
from support.small_model import NEVER, SMALL, STEPS, fresh, reused, run, same
from support.toy_models import call, trajectory


def test_what_is_not_finite_is_never_reused() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=STEPS)
    lazy.policy = NEVER
    spoiled = {"now": False}

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * float("nan") if spoiled["now"] else output

    branch = lazy.graph.program.graph_module.get_submodule("lazy_branch_0")
    compute = branch.compute
    branch.compute = lambda inputs: tuple(spoil(None, None, output) for output in compute(inputs))
    spoiled["now"] = True
    (first,) = run(lazy, calls[:1])
    spoiled["now"] = False
    assert first.isnan().all()
    outputs = run(lazy, calls[1:])
    assert all(output.isfinite().all() for output in outputs)
    assert reused(lazy)[1] == [0.0, 0.0]
    assert reused(lazy)[2] == [1.0, 1.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_no_trace(error: type[BaseException]) -> None:
    lazy, calls = fresh(reuse="last"), trajectory(SMALL, steps=STEPS)
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    expected = run(lazy, calls)
    branch = lazy.graph.program.graph_module.get_submodule("lazy_branch_1")
    forward = branch.forward

    def fail(*inputs: Any) -> Any:
        raise error

    for failing in (1, 2, 3, 4):  # steps that reuse, and that compute; the first branch is done when the second fails
        lazy.reset()
        lazy.reset_stats()
        outputs = run(lazy, calls[:failing])
        branch.forward = fail
        with pytest.raises(error):
            run(lazy, calls[failing : failing + 1])
        branch.forward = forward
        outputs += run(lazy, calls[failing:])
        assert same(outputs, expected)
        assert lazy.stats.calls == STEPS


def test_a_host_that_knows_needs_no_latents_that_follow() -> None:
    lazy = fresh()
    lazy.policy = NEVER
    calls = [call(SMALL, 1, step=step, seed=step) for step in range(3)]
    run(lazy, calls)
    assert reused(lazy) == [[0.0, 0.0]]
    lazy.reset_stats()

    def step(number: int) -> None:
        with lazy.trajectory("mine", step=number, steps=3):
            run(lazy, calls[number : number + 1])

    for number in range(3):
        thread = threading.Thread(target=step, args=(number,))
        thread.start()
        thread.join()
    assert reused(lazy) == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    lazy.reset_stats()
    step(0)  # it ended with its last step
    assert reused(lazy) == [[0.0, 0.0]]


def test_rows_of_several_requests_are_named_one_by_one() -> None:
    lazy = fresh()
    lazy.policy = NEVER
    rows = {
        name: [call(SMALL, 1, step=step, seed=step + 10 * number) for step in range(3)]
        for number, name in enumerate("ab")
    }

    def batch(*items: tuple[str, int]) -> None:
        given = [rows[name][step] for name, step in items]
        joined = {key: torch.cat([each[key] for each in given]) for key in given[0]}
        with lazy.trajectory([name for name, _ in items], step=[step for _, step in items]):
            run(lazy, [joined])

    batch(("a", 0))
    batch(("b", 0), ("a", 1))
    batch(("a", 2), ("b", 1))
    assert reused(lazy) == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


def test_a_driver_sees_the_step_that_follows() -> None:
    lazy, steps = fresh(), []

    def note(model_call: ModelCall) -> Any:
        steps.append(model_call.step)
        return lazy._follow_policy(model_call)

    with lazy.call_handler(note):
        run(lazy, trajectory(SMALL, steps=4))
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("write", ["data.copy_", "numpy", "weight.data +=", "weight.data =", "inference"])
def test_writes_that_nobody_counts_are_noticed(write: str) -> None:
    model = CONDITIONED.model().eval()
    lazy = lazy_compile.transform(CONDITIONED.model().eval(), call(CONDITIONED))
    lazy.original.load_state_dict(model.state_dict())
    for each in (model, lazy.original):
        text = call(CONDITIONED)["text"].clone()
        outputs = []
        for step, arguments in enumerate(trajectory(CONDITIONED, steps=5)):
            if step == 3:
                _write(write, each, text)
            with torch.inference_mode() if write == "inference" else torch.no_grad():
                denoiser = each if each is model else lazy
                outputs.append(denoiser(**{**arguments, "text": text}))
        if each is model:
            expected = outputs
    assert same(outputs, expected)


def _write(kind: str, model: Any, text: Tensor) -> None:
    weight = next(item for item in model.parameters() if item.dim() > 1)
    with torch.no_grad():
        if kind == "data.copy_":
            text.data.copy_(text + 1.0)
        elif kind == "numpy":
            text.numpy()[...] += 1.0
        elif kind == "weight.data +=":
            for item in model.parameters():
                item.data += 0.5
        elif kind == "weight.data =":
            weight.data = weight.data + 0.5
    if kind == "inference":
        with torch.inference_mode():
            for item in model.parameters():
                item.add_(0.5)
