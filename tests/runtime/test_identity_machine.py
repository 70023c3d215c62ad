"""Requests that are served in any order and any batch, against the same requests alone on a plain model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, LazyModule, Scheduled
from lazy_compile.ir.lazy_branch import LazyBranch
from support.served import GUIDANCES, MODULES, SAMPLERS, Asked, Kind, PlainServer, Served, adapted, joined

CALLS = 24
"""More than any request makes."""

TOLERANCE = 2e-5

KINDS = st.builds(
    Kind,
    noise=st.integers(0, 2),
    texts=st.sampled_from([(0, 1), (2, 1), (0, 3)]),
    sampler=st.sampled_from(SAMPLERS),
    guidance=st.sampled_from(GUIDANCES),
    start=st.integers(0, 2),
)

TABLES = st.one_of(
    st.integers(2, 4).map(lambda n: CacheSchedule.every(n, CALLS, len(MODULES)).should_compute),
    st.integers(0, 50).map(lambda seed: CacheSchedule.random(0.5, CALLS, len(MODULES), seed=seed).should_compute),
    st.just(np.array([[True] * len(MODULES)] + [[False] * len(MODULES)] * (CALLS - 1))),
)


@cache
def lazy_model(reuse: str) -> LazyModule:
    """Captured once: the machines put its weights back."""
    model = adapted()
    example = joined([Asked(torch.zeros(16, 32), 1.0, torch.zeros(5, 32), torch.zeros(32))] * 2)
    return lazy_compile.transform(model, example, reuse=reuse)


class Serving(RuleBasedStateMachine):
    """One lazy model serves requests; after each call every row is compared with what its request gets alone."""

    rows: ClassVar[int] = 0

    @initialize(reuse=st.sampled_from(["last", "linear"]), table=TABLES)
    def start(self, reuse: str, table: np.ndarray) -> None:
        self.lazy = lazy_model(reuse)
        with torch.no_grad():
            for mine, fresh in zip(self.lazy.original.parameters(), adapted().parameters(), strict=True):
                mine.copy_(fresh)
        _adapter(self.lazy.original).scale = 1.0
        self.plain = PlainServer(self.lazy.original, reuse)
        self.running: list[Served] = []
        self.arrived = 0
        self.seen: set[tuple[int, int]] = set()
        self.change_policy(table)

    @rule(table=TABLES)
    def change_policy(self, table: np.ndarray) -> None:
        """Between requests: one that goes on would begin anew."""
        self.running.clear()
        self.seen.clear()
        self.lazy.policy = Scheduled(CacheSchedule(table))
        self.plain.set_table(table)

    @precondition(lambda self: len(self.running) < 5)
    @rule(kind=KINDS)
    def arrive(self, kind: Kind) -> None:
        self.arrived += 1
        if kind.sampler == "ancestral":  # noise leaves less to prove by: of two that draw the same, or of a condition
            guidance = "none" if kind.guidance == "late" else kind.guidance  # that is new, nobody knows whose it is
            kind = replace(kind, noise=100 * self.arrived, guidance=guidance)
        if kind.start or (kind.noise, kind.texts[0]) in self.seen:  # requests that are the same have tests of their own
            kind = replace(kind, noise=100 * self.arrived)
        self.seen.add((kind.noise, kind.texts[0]))
        self.running.append(Served(kind))

    @precondition(lambda self: self.running)
    @rule(choice=st.randoms(use_true_random=False), size=st.integers(1, 4), thread=st.booleans())
    def call(self, choice: Any, size: int, thread: bool) -> None:
        """Some requests make their next call, together, in any order."""
        chosen = choice.sample(self.running, min(size, len(self.running)))
        rows = [(request, row) for request in chosen for row in request.asked or []]
        choice.shuffle(rows)
        answers: dict[tuple[int, int], Tensor] = {}
        outputs = self._answers([row for _, row in rows], thread=thread)
        for (request, row), output in zip(rows, outputs, strict=True):
            expected = self.plain.answer(request, row)
            scale = max(1.0, float(expected.abs().max()))
            difference = float((output - expected).abs().max())
            assert difference <= TOLERANCE * scale, f"{request.kind}, {row.time:.0f}: off by {difference / scale:.2g}"
            answers[id(request), row.condition] = output
        for request in chosen:
            request.answer([answers[id(request), row.condition] for row in request.asked or []])
        self.running = [request for request in self.running if request.asked is not None]
        Serving.rows += len(rows)

    @precondition(lambda self: self.running)
    @rule(choice=st.randoms(use_true_random=False))
    def cancel(self, choice: Any) -> None:
        self.running.remove(choice.choice(self.running))

    @precondition(lambda self: self.running)
    @rule(choice=st.randoms(use_true_random=False), size=st.integers(1, 4), branch=st.integers(0, 2))
    def fail(self, choice: Any, size: int, branch: int) -> None:
        """A call that raises in one of its branches; nobody gets an answer."""
        chosen = choice.sample(self.running, min(size, len(self.running)))
        rows = [row for request in chosen for row in request.asked or []]

        def fail(branch_module: LazyBranch, *inputs: Any) -> Any:
            if branch_module.branch.index == branch:
                raise FloatingPointError
            return forward(branch_module, *inputs)

        forward = LazyBranch.forward
        LazyBranch.forward = fail  # type: ignore[assignment, method-assign]
        try:
            with pytest.raises(FloatingPointError):
                self._answers(rows)
        finally:
            LazyBranch.forward = forward  # type: ignore[method-assign]

    @rule(seed=st.integers(10, 20), rows=st.integers(1, 3))
    def warm_up(self, seed: int, rows: int) -> None:
        """Calls that belong to nobody."""
        kind = Kind(noise=seed)
        asked = [row for _ in range(rows) for row in next(kind.rows())]
        self._answers(asked)

    @rule(name=st.sampled_from(["attn.v.weight", "embed_text.weight", "mlp.up.weight"]), way=st.integers(0, 3))
    def write_weights(self, name: str, way: int) -> None:
        self._edit(lambda model: _write(model, name, way))

    @rule(scale=st.sampled_from([0.5, 1.0, 1.5]))
    def scale_adapter(self, scale: float) -> None:
        """A number that the graph holds as a constant: each value has caches of its own."""
        if scale != _adapter(self.lazy.original).scale:
            self._edit(lambda model: setattr(_adapter(model), "scale", scale))

    def _edit(self, change: Callable[[nn.Module], None]) -> None:
        change(self.lazy.original)
        self.plain.edit(change)

    def _answers(self, rows: list[Asked], *, thread: bool = False) -> list[Tensor]:
        results: list[Tensor] = []

        def work() -> None:
            with torch.no_grad():
                results.extend(self.lazy(**joined(rows)))

        if thread:
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
        else:
            work()
        return results


def _adapter(model: nn.Module) -> Any:
    return model.adapter


def _write(model: nn.Module, name: str, way: int) -> None:
    weight = model.get_parameter(name)
    if way == 0:
        weight.data = weight.data * 0.97
    elif way == 1:
        weight.data.mul_(1.03)
    else:
        with torch.no_grad() if way == 2 else torch.inference_mode():
            weight.mul_(0.98)


def serve(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Serving,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
            report_multiple_bugs=False, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),
    )  # fmt: skip


def test_a_number_in_a_plain_object_of_the_model_is_noticed() -> None:
    lazy = lazy_model("last")
    lazy.policy = AlwaysCompute()
    inputs = joined(next(Kind().rows()))
    with torch.no_grad():
        for scale in (0.5, 1.0):  # the last one was captured before
            _adapter(lazy.original).scale = scale
            assert torch.equal(lazy(**inputs), lazy.original(**inputs))


@pytest.mark.parametrize("order", [[0, 1] * 30, [0, 1, 0, 0, 1, 1, 1, 0] * 8, [1, 0, 0, 0, 1, 1] * 10])
@pytest.mark.parametrize("guidance", ["none", "toggled", "unconditional first"])
def test_the_same_request_twice_is_two_requests(order: list[int], guidance: str) -> None:
    lazy = lazy_model("last")
    table = CacheSchedule.every(3, CALLS, len(MODULES)).should_compute
    lazy.policy, plain = Scheduled(CacheSchedule(table)), PlainServer(lazy.original, "last")
    plain.set_table(table)
    requests = [Served(Kind(guidance=guidance)) for _ in range(2)]
    for number in order:
        request = requests[number]
        if request.asked is None:
            continue
        outputs = []
        for row in request.asked:
            with torch.no_grad():
                outputs.append(lazy(**joined([row]))[0])
            assert torch.allclose(outputs[-1], plain.answer(request, row), atol=1e-4, rtol=1e-4)
        request.answer(outputs)
    assert all(request.asked is None for request in requests)


def test_a_server_answers_every_request_as_if_it_were_alone() -> None:
    serve(examples=3, steps=30)


@pytest.mark.slow
def test_a_server_answers_every_request_as_if_it_were_alone_for_long() -> None:
    """10,000 steps."""
    serve(examples=200, steps=50)
