"""Gated steps in PyTorch that a compiler or a CUDA graph can take whole: one lean program for each set of decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile import LazyModule
from lazy_compile.ir.branch_arms import BranchArms, state_names
from lazy_compile.ir.pass_manager import PassManager
from lazy_compile.ir.program import Program, Role, module_state
from lazy_compile.ir.state_tensors import initial_value
from lazy_compile.passes.apply_schedule import ApplySchedule
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots

Step = Callable[[], Any]


class LeanSteps:
    """Steps of one model with fixed decisions, and the slots that they share, which stay where they are.

    A step writes each slot that it changes after all else, so that a captured step repeats the same addresses.
    """

    def __init__(self, lazy: LazyModule, inputs: dict[str, Any], leaders: Sequence[int] = ()) -> None:
        self.lazy = lazy
        self.graph, self.tensors = lazy._graph_for((), inputs)
        lift = LiftCacheSlots(lazy.lazy_config.reuse, gating="input", leaders=tuple(leaders), predictors=False)
        self.lifted = lift(self.graph.program).program
        self.slots: dict[str, Tensor] = {}

    def step(self, mask: Sequence[bool], wrap: Callable[[Any], Any] = lambda module: module) -> Step:
        """One step that computes where ``mask`` holds; ``wrap`` may compile its graph."""
        program = PassManager([ApplySchedule(tuple(map(bool, mask)))]).run(self.lifted)
        return self._step(program, wrap(program.graph_module), {})

    def conditional(self, decisions: dict[str, Tensor]) -> Step:
        """One step that reads its decisions on the GPU, for capture with CUDA's conditional nodes; last reuse only."""
        return self._step(self.lifted, _Conditional(self.lifted.graph_module).run, decisions)

    def _step(self, program: Program, call: Callable[..., Any], decisions: dict[str, Tensor]) -> Step:
        values: list[Any] = program.bind(module_state(self.lazy.original), self.tensors)
        for item, fake in zip(program.inputs, program.fake_inputs(), strict=True):
            if item.role is Role.SLOT:
                values.append(self._slot(item.name, fake))
            elif item.role is Role.GATE:
                slope = torch.ones(fake.shape, device=self.tensors[0].device)
                values.append(decisions.get(item.name, slope))
        names = state_names(program)

        def step() -> Any:
            results = list(call(*values))
            own = results[: len(results) - len(names)]
            for name, result in zip(names, results[len(own) :], strict=True):
                self._slot(name, result).copy_(result)
            return own

        return step

    def _slot(self, name: str, like: Any) -> Tensor:
        if name not in self.slots:
            sizes = [int(getattr(size, "node", size).hint if hasattr(size, "node") else size) for size in like.shape]
            device = self.tensors[0].device
            self.slots[name] = torch.full(sizes, initial_value(name), dtype=like.dtype, device=device)
        return self.slots[name]


class _Conditional(fx.Interpreter):
    """Runs a lifted program; the body of every branch stands in a conditional node of the graph that is captured."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, BranchArms):
            return super().call_module(target, args, kwargs)
        decision, *arguments = args
        state, inputs = module.split(arguments)
        outputs = [cache.clone() for cache in module.reuse(*state)]
        with _if_node(decision):
            for output, computed in zip(outputs, module.body(*inputs), strict=True):
                output.copy_(computed)
        return (*outputs, *outputs)


@contextmanager
def _if_node(decision: Tensor) -> Any:
    graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()  # type: ignore[attr-defined]
    graph.begin_capture_to_if_node(decision)
    try:
        yield
    finally:
        graph.end_capture_to_conditional_node()


def captured(step: Step) -> Step:
    """A CUDA graph of a step, run three times before as CUDA asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
