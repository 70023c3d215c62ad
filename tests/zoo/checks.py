"""What every zoo model is asked. A check returns what it saw, in a few words, and fails with an AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile import CacheSchedule, LazyModule, Learned, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.calibration.soft_step import SoftStep
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.sampling import DenseStep
from support.toy_models import TOLERANCE, counted_by_torch
from zoo.attention import attentions, names_inside, names_outside, token_macs
from zoo.exceptions import OUTSIDE
from zoo.gates import mixed_gates
from zoo.golden import described, golden
from zoo.graph_oracle import GraphOracle
from zoo.sizes import combinations, resized_calls
from zoo.subject import BATCH, Call, Subject, answer, plainly, row_of, run, tensors_of

STEPS = 5
ONNX_TOLERANCE = 1e-4
MIXED = 1e-4

COMBINATIONS = 5
"""Of sizes, for each model."""


def captures(subject: Subject) -> str:
    """It is captured and transformed; by which strategy."""
    return subject.graph.captured.strategy


def branches(subject: Subject) -> str:
    """The branches are the expected ones."""
    assert described(subject) == golden(subject.name)
    return f"{len(subject.lazy.branches)} branches"


def attention(subject: Subject) -> str:
    """Every attention is in a branch, or listed with its reason."""
    inside, outside = names_inside(subject.graph.program), names_outside(subject.graph.program)
    found = list(attentions(subject.graph.captured.program))
    assert found, "no attention found"
    left = {node.meta["module_path"] for node in found if node.name in outside}
    listed = OUTSIDE.get(subject.name, {})
    assert left == set(listed), f"outside of branches: {sorted(left)}; listed: {sorted(listed)}"
    return f"{sum(node.name in inside for node in found)} of {len(found)}"


def share(subject: Subject) -> str:
    """Share of the multiply-accumulates on tokens that branches hold. All of them are what torch counts.

    A model may compute what it does not use (what the last block makes of the text); a graph does not.
    """
    with plainly():
        counted = counted_by_torch(subject.model, subject.calls(1)[0])
    total = subject.graph.total_macs
    assert 0.9 * counted <= total <= 1.01 * counted, f"{total} multiply-accumulates, torch counts {counted:.0f}"
    return f"{token_share(subject):.1%}"


def token_share(subject: Subject) -> float:
    macs = token_macs(subject.graph.captured.program, BATCH)
    inside, outside = names_inside(subject.graph.program), names_outside(subject.graph.program)
    held = sum(cost for name, cost in macs.items() if name in inside)
    return held / (held + sum(cost for name, cost in macs.items() if name in outside))


def exact(subject: Subject) -> str:
    """While everything computes, every result is the original's bit for bit."""
    lazy, calls = subject.fresh(), subject.calls(3)
    for step, call in enumerate(calls):
        with torch.no_grad(), plainly():
            assert_identical(answer(lazy, call), answer(subject.model, call), step)
    assert lazy.stats.calls == len(calls)
    return "bitwise"


def schedule(subject: Subject) -> str:
    """Under a random schedule every result is the oracle's."""
    worst = 0.0
    calls = subject.calls(STEPS)
    dense = run(subject.model, calls)
    for reuse in ("last", "linear"):
        lazy = subject.fresh(reuse=reuse)
        table = random_schedule(lazy)
        lazy.policy = Scheduled(table)
        seen = run(lazy, calls)
        assert lazy.stats.lazy_ratio >= 0.4
        captured = lazy.graph.captured.program
        oracle = GraphOracle(subject.model, captured, lazy.branches, table.should_compute, reuse)
        expected = [oracle(CallLayout.of((), call)[1]) for call in calls]
        assert max(map(difference, seen, dense)) > 1e-4, "reuse changed nothing"
        worst = max(worst, *map(difference, seen, expected))
    assert worst <= TOLERANCE["another batch"], f"differs by {worst:.2g} from the oracle"
    return f"{worst:.0e}"


def gradients(subject: Subject) -> str:
    """A gradient reaches the gate of every branch that has a say in the result."""
    lazy = subject.fresh(reuse="last")
    caches = CacheState()
    gates = [
        (torch.zeros(branch.gate_features, requires_grad=True), torch.zeros((), requires_grad=True))
        for branch in lazy.branches
    ]
    with plainly():
        for step, call in enumerate(subject.calls(2)):
            result = lazy.evaluate(SoftStep(gates, lazy.lazy_config, caches, step), **call)
            for index, slot in caches.slots.items():  # conditions stay, and so does what depends on nothing else
                caches.slots[index] = replace(slot, values=tuple(1.5 * value for value in slot.values))
    generator = torch.Generator().manual_seed(2)
    loss = sum((item.float() * torch.randn(item.shape, generator=generator)).sum() for item in tensors_of(result))
    loss.backward()
    dead = [
        branch.name
        for branch, (weight, bias) in zip(lazy.branches, gates, strict=True)
        if not all(item.grad is not None and item.grad.isfinite().all() and item.grad.any() for item in (weight, bias))
    ]
    heard = [name for name in dead if _has_a_say(subject, name)]
    assert not heard, f"no gradient at {', '.join(heard)}"
    return f"{len(gates) - len(dead)} of {len(gates)} gates" if dead else f"{len(gates)} gates"


def _has_a_say(subject: Subject, name: str) -> bool:
    """Whether the result is another one where a branch returns something else."""

    class Otherwise(DenseStep):
        def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
            outputs = branch.compute(inputs)
            return tuple(item + 1 for item in outputs) if branch.branch.name == name else outputs

    (call,) = subject.calls(1)
    with torch.no_grad(), plainly():
        usual, other = (tensors_of(subject.lazy.evaluate(step, **call)) for step in (DenseStep(), Otherwise()))
    return not all(map(torch.equal, usual, other))


def batch(subject: Subject, seed: int = 0, reuse: str = "linear", order: tuple[int, ...] = (0, 1)) -> str:
    """Under gates that decide differently for two rows, both give what each gives in a call of its own.

    The single calls of one step are parallel streams, as under classifier-free guidance; they are named where no
    timestep tells them. A branch whose rows are mixed decides once per call, and says why. Where the original itself
    gives something else for a batch, only the branches are held to what they say of themselves.
    """
    apart = own_difference(subject)
    if apart > MIXED:
        return f"{separate_rows(subject)} of {len(subject.lazy.branches)}, branches alone"
    lazy, calls = subject.fresh(reuse=reuse), subject.calls(STEPS)
    lazy.capture(**subject.arguments)  # single rows may have had another graph
    separable = [branch.row_separable for branch in lazy.branches]
    assert all(branch.row_separable or branch.why_not_separable for branch in lazy.branches)
    lazy.policy = Learned(mixed_gates(lazy, calls, seed))
    lazy.reset_stats()
    together = [_rows(lazy, call) for call in calls]
    if any(separable):
        varying = 0.1 * sum(separable) / len(separable)
        assert lazy.stats.decisions_varying_between_samples > varying, "the rows decided alike"
    lazy.reset()
    worst = 0.0
    for call, both in zip(calls, together, strict=True):
        for row in order:
            with nullcontext() if lazy.graph.timestep_input else lazy.stream(f"row {row}"):
                (single,) = run(lazy, [subject.row(call, row)])
            worst = max(worst, difference(both[row], single))
    tolerance = 1e-3 if rounds_to_halves(subject) else 10 * max(TOLERANCE["another batch"], apart)
    assert worst <= tolerance, f"rows differ by {worst:.2g} from single calls"
    return f"{sum(separable)} of {len(separable)}"


def rounds_to_halves(subject: Subject) -> bool:
    """Whether the model casts to a half type on the way: the last bit of such a value is 1e-3 of it or more."""
    values = [node.meta.get("val") for node in subject.graph.captured.program.graph.nodes]
    return any(isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) for value in values)


def own_difference(subject: Subject) -> float:
    """How far the original's results for a batch are from those for its rows; beyond ``MIXED`` it mixes them."""
    (call,) = subject.calls(1)
    both = _rows(subject.model, call)
    return max(difference(both[row], run(subject.model, [subject.row(call, row)])[0]) for row in range(BATCH))


def separate_rows(subject: Subject) -> int:
    """How many branches decide for each row: what they give for a row alone is what they give for it in a batch."""
    found = 0

    class Separate:
        """A step that computes every branch for all rows and for each alone."""

        def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
            nonlocal found
            outputs = branch.compute(inputs)
            if branch.branch.row_separable:
                found += 1
                axes = [item.batch_axis or 0 for item in branch.branch.outputs]
                for row in range(BATCH):
                    alone = branch.compute(branch.picked(inputs, torch.tensor([row])))
                    both = [item.narrow(axis, row, 1) for item, axis in zip(outputs, axes, strict=True)]
                    worst = difference(list(alone), both)
                    name = branch.branch.name
                    assert worst <= TOLERANCE["another batch"], f"a row of {name} alone differs by {worst:.2g}"
            return outputs

    with torch.no_grad(), plainly():
        subject.lazy.evaluate(Separate(), **subject.arguments)
    return found


def onnx(subject: Subject) -> str:
    """Exported with ``If``, sound in structure, and in ONNX Runtime what PyTorch gives, with and without reuse."""
    lazy, (runner, problems) = subject.fresh(), subject.exported
    assert not problems, "; ".join(problems)
    worst = 0.0
    for table in (CacheSchedule.always_compute(2, len(lazy.branches)), random_schedule(lazy)):
        worst = max(worst, _between_runtimes(lazy, EngineDenoiser(runner), subject.calls(table.steps), table))
    assert worst <= ONNX_TOLERANCE, f"differs by {worst:.2g} from PyTorch"
    return f"{worst:.0e}"


def sizes(subject: Subject) -> str:
    """The same file at other batches, resolutions and lengths, over whole trajectories; which sizes are free.

    PyTorch and ONNX Runtime are given the same; sizes that the model itself refuses, or the file by a condition that it
    names, are no combination.
    """
    lazy, (runner, _) = subject.fresh(), subject.exported
    if not runner.metadata.sizes:
        return "none"
    worst, done, table = 0.0, 0, random_schedule(lazy)
    for chosen in combinations(runner.metadata.example):
        if done == COMBINATIONS:
            break
        if (calls := resized_calls(subject, runner.metadata, chosen)) is None:
            continue
        worst, done = max(worst, _between_runtimes(lazy, EngineDenoiser(runner), calls, table)), done + 1
        assert worst <= ONNX_TOLERANCE, f"at {chosen} it differs by {worst:.2g} from PyTorch"
    return f"{', '.join(size.name for size in runner.metadata.sizes)}: {done}"


def _between_runtimes(lazy: LazyModule, denoiser: EngineDenoiser, calls: Sequence[Call], table: CacheSchedule) -> float:
    """The largest difference over a trajectory that follows a schedule."""
    lazy.policy = denoiser.policy = Scheduled(table)
    lazy.reset()
    expected = run(lazy, calls)
    return max(
        difference(tensors_of(answer(denoiser, call)), tensors) for call, tensors in zip(calls, expected, strict=True)
    )


CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__: check
    for check in (captures, branches, attention, share, exact, schedule, gradients, batch, onnx, sizes)
}


def random_schedule(lazy: LazyModule) -> CacheSchedule:
    return CacheSchedule.random(0.5, STEPS, len(lazy.branches), seed=len(lazy.branches))


def difference(seen: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, per unit of the largest value; NaN counts as infinite."""
    assert [item.shape for item in seen] == [item.shape for item in expected]
    scale = max(1.0, *(float(item.abs().max()) for item in expected))
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(seen, expected, strict=True)) / scale
    return worst if worst == worst else float("inf")


def assert_identical(seen: object, expected: object, step: int) -> None:
    leaves, spec = pytree.tree_flatten(seen)
    others, other_spec = pytree.tree_flatten(expected)
    assert spec == other_spec
    for a, b in zip(leaves, others, strict=True):
        if isinstance(b, Tensor):
            assert torch.equal(a, b), f"step {step}: differs by {difference([a], [b]):.2g}"
        else:
            assert a == b


def _rows(model: torch.nn.Module, call: Call) -> list[list[Tensor]]:
    """The result of one call, row by row."""
    with torch.no_grad(), plainly():
        result = answer(model, call)
    if not isinstance(result, tuple | dict):
        result = (result,)
    return [tensors_of(row_of(result, row)) for row in range(BATCH)]
