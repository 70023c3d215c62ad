from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lazy_compile.ir.operators import value_of
from lazy_compile.ir.program import Program, module_state
from lazy_compile.passes.canonicalize import Canonicalize
from lazy_compile.passes.split_complex import SplitComplex
from support.graph_text import after

ROTATION = torch.polar(torch.ones(6, 3), torch.arange(18.0).reshape(6, 3))


class Computes(nn.Module):
    """Applies a function to pairs ``float[2, 6, 3, 2]`` as complex numbers, and to a table of the model's own."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", ROTATION)

    def forward(self, x: Tensor) -> Tensor:
        result = self.function(torch.view_as_complex(x), self.table)
        return torch.view_as_real(result) if result.is_complex() else result


def captured(model: nn.Module) -> tuple[Program, Tensor]:
    x = torch.randn(2, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    program = Program.from_exported(torch.export.export(model, (x,)).run_decompositions({}))
    return Canonicalize()(program).program, x


def complex_nodes(program: Program) -> list[str]:
    """What still handles complex numbers when the graph is run."""
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, Tensor) and result.is_complex():
                found.append(n.name)
            return result

    values = [value_of(node) for node in program.placeholders]
    Watch(program.graph_module).run(*[torch.zeros(value.shape, dtype=value.dtype) for value in values])
    return found


@pytest.mark.parametrize(
    "function",
    [
        lambda z, table: z * table,
        lambda z, table: 2.0 * z * table.real,
        lambda z, table: z.imag * z.real,
        lambda z, table: z * table.conj() - z + table,
        lambda z, table: torch.polar(z.real, z.imag) * torch.complex(z.real, z.imag),
        lambda z, table: -z.transpose(1, -1).permute(0, -1, 1)[:, :, None].squeeze(2),
        lambda z, table: z.reshape(2, -1, 1).expand(2, 18, 4).repeat(1, 1, 2),
        lambda z, table: torch.cat([z, z[:, 2:4]], dim=-2) * torch.stack([table[0], table[3]]).unsqueeze(-2),
        lambda z, table: torch.cat([part * table for part in (z * table).split([1, 2], dim=-1)[:1]], dim=1),
        lambda z, table: z * table[torch.tensor([5, 4, 3, 2, 1, 0])],
        lambda z, table: z[:, :2] * table.gather(0, torch.tensor([[5, 0, 3], [4, 4, 1]])),
        lambda z, table: torch.nn.utils.rnn.pad_sequence([table[:2], table], batch_first=True) * z,
        lambda z, table: z.to(torch.complex128) * z.real.to(torch.complex128),
        lambda z, table: torch.zeros(6, 3, dtype=torch.complex64).index_copy(0, torch.tensor([1]), table[:1]) + z,
        lambda z, table: z * table.new_zeros(6, 3).select_scatter(table[2], 0, 4).slice_scatter(table[:, :1], -1, 0, 1),
    ],
)
def test_pairs_give_what_complex_numbers_give(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Computes(function)
    before, x = captured(model)
    result = SplitComplex()(before)
    assert result.modified
    seen = result.program.graph_module(*result.program.bind(module_state(model), [x]))[0]
    torch.testing.assert_close(seen, model(x))
    assert complex_nodes(before)
    left = complex_nodes(result.program)
    assert not left or "index_copy" in str(before.graph)
    assert not SplitComplex()(result.program).modified


def test_an_operator_without_a_rule_still_reads_complex_numbers() -> None:
    model = Computes(lambda z, table: (z * table).exp().abs())
    before, x = captured(model)
    result = SplitComplex()(before)
    seen = result.program.graph_module(*result.program.bind(module_state(model), [x]))[0]
    torch.testing.assert_close(seen, model(x))
    assert len(complex_nodes(result.program)) == 2
    assert not SplitComplex()(result.program).modified


def test_real_numbers_stay_modified_false() -> None:
    source = "x: f32[B, N, 8]\n a = cos(x)\n b = mul.Tensor(a, x)\n return b"
    assert after(SplitComplex(), source) == ("a = cos(x)\nb = mul.Tensor(a, x)\nreturn b", False)
