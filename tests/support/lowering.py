"""Running lifted, flat and scheduled programs step by step, as an engine's runtime would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lazy_compile import GateTable, LazyModule
from lazy_compile.ir.branch_arms import state_names
from lazy_compile.ir.operators import size_hint
from lazy_compile.ir.program import Program, Role, module_state
from lazy_compile.ir.state_tensors import initial_value
from lazy_compile.policies.gate_table import FORCE, GateRow

STEPS = 20


class OneBranch(nn.Module):
    """The smallest model with a branch: ``x + W₂ relu(W₁ (s x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(s[:, None, None] * x)))


def text(program: Program) -> list[str]:
    """One line for each operator and the result of a graph, with names that do not depend on how it came about."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        names[node] = item.name
    for node in program.graph.nodes:
        arguments = str(fx.map_arg(node.args, lambda argument: names[argument])).replace("'", "").replace(",)", ")")
        if node.op in ("call_function", "call_module"):
            names[node] = f"%{len(lines)}"
            target = getattr(node.target, "__name__", node.target)
            lines.append(f"{names[node]} = {target}{arguments}")
        elif node.op == "output":
            lines.append(f"return {arguments[1:-1]}")
    return lines


def random_gates(lazy: LazyModule, knots: Tensor, seed: int = 0, scale: float = 20.0) -> GateTable:
    """Gates whose decisions vary from step to step and from sample to sample."""
    table = GateTable.constant(lazy.branches, knots)
    generator = torch.Generator().manual_seed(seed)
    table.weight.copy_(scale * torch.randn(table.weight.shape, generator=generator))
    return replace(table, slope=2 * torch.rand(table.bias.shape, generator=generator) - 0.5)


def knots(steps: int = STEPS) -> Tensor:
    """The timesteps of ``models.trajectory``."""
    return torch.tensor([float(round(999 * (1 - step / steps))) for step in range(steps)], dtype=torch.float64)


def forced(row: GateRow, computes: bool = True) -> GateRow:
    """A row with which every branch computes, or reuses, whatever it reads."""
    return GateRow(torch.zeros_like(row.weight), torch.full_like(row.bias, FORCE if computes else -FORCE))


class Replay:
    """Calls the program of one model step by step, and keeps its slots."""

    def __init__(self, model: nn.Module, void: float | None = None) -> None:
        self.model = model
        self.void = void
        self.slots: dict[str, Tensor] = {}
        self.logits = torch.empty(0)

    @torch.no_grad()
    def __call__(
        self,
        program: Program,
        tensors: Sequence[Tensor],
        row: GateRow | None = None,
        slopes: Sequence[float] | None = None,
    ) -> list[Tensor]:
        """The model's own outputs. Slots that the program does not write keep their value."""
        values: list[Any] = program.bind(module_state(self.model), tensors)
        for item, fake in zip(program.inputs, program.fake_inputs(), strict=True):
            if item.role is Role.SLOT:
                values.append(self.slots.setdefault(item.name, self._initial(item.name, fake)))
            elif item.role is Role.GATE:
                given = {"slope": torch.ones(fake.shape) if slopes is None else torch.tensor(slopes)}
                if row is not None:
                    given |= {"gate_weight": row.weight, "gate_bias": row.bias}
                values.append(given[item.name])
        results = list(program.graph_module(*values))
        own = len(results) - program.state_outputs
        state = dict(zip(state_names(program), results[own:], strict=True))
        self.logits = state.pop("compute_logits", self.logits)
        self.slots.update(state)
        return results[:own]

    def _initial(self, name: str, fake: Tensor) -> Tensor:
        value = initial_value(name)
        if self.void is not None and value == 0.0:
            value = self.void
        return torch.full([size_hint(size) for size in fake.shape], value, dtype=fake.dtype)
