"""Exported graphs made functional piece by piece: as the whole tracing of torch does it, and always like the model."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lazy_compile.capture import functionalize as module
from lazy_compile.capture.functionalize import functional
from lazy_compile.ir.program import Program
from lazy_compile.passes.canonicalize import Canonicalize

aten = torch.ops.aten


def rotary(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out.type_as(x) + 1


def masked(x: Tensor) -> Tensor:
    mask = (x > 0) & (x < 1).repeat(1, 1)
    mask = mask.bool()
    mask[:, 0] = True
    return x.masked_fill(~mask, 0.0)


def chained(x: Tensor) -> Tensor:
    y = x * 2
    return y.add_(1).mul_(3).clamp_(min=0.0) + y


def through_views(x: Tensor) -> Tensor:
    y = x.clone()
    first, second = y.chunk(2, dim=-1)
    y.unflatten(-1, (2, -1))[..., 0, :].zero_()
    second.add_(first)
    return y.flatten(1).reshape(-1, 2) + y.reshape(-1, 2)


def read_in_between(x: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.add_(1)
    return y * z


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x.T).float()


def of_a_tuple(x: Tensor) -> Tensor:
    values = torch.sort(x)[0]
    values[:, 0] = 7.0
    return values + x


def composites(x: Tensor) -> Tensor:
    a, b = x.to(torch.float64).chunk(2, -1)
    return (a.contiguous().flatten() * b.reshape(-1)).to(x.dtype).unflatten(0, (x.shape[0], -1))


def of_one_size(x: Tensor) -> Tensor:
    y = x * 2
    return y + x.new_ones(y.shape[0], 8) + torch.ones(3, 8)  # there can be no more rows, as export finds out here


PIECEWISE = [rotary, masked, chained, through_views, composites]
WHOLE = [read_in_between, under_autocast, of_a_tuple]


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def export(model: nn.Module) -> ExportedProgram:
    return torch.export.export(model.eval(), (torch.randn(3, 8),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.STATIC},))


def is_functional(exported: ExportedProgram) -> bool:
    targets = [node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return not any(target._schema.is_mutable for target in targets)


def operators(exported: ExportedProgram) -> list[str]:
    program = Program.from_exported(exported)
    Canonicalize().apply(program)
    return sorted(str(node.target) for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def run(exported: ExportedProgram, x: Tensor) -> Tensor:
    program = Program.from_exported(exported)
    return program.graph_module(*program.bind(exported.state_dict, [x]))[0]


@pytest.fixture
def wholes(monkeypatch) -> list[ExportedProgram]:
    """The programs that were traced as a whole."""
    seen, original = [], ExportedProgram.run_decompositions

    def noted(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return seen


@pytest.mark.parametrize("function", PIECEWISE + WHOLE)
def test_a_functional_program_returns_the_same_bits_at_every_size(function, wholes):
    result = functional(export(Calls(function)))
    assert is_functional(result)
    assert bool(wholes) is (function in WHOLE)
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        assert torch.equal(run(result, x), function(x))


@pytest.mark.parametrize("function", PIECEWISE)
def test_it_holds_the_operators_of_a_program_that_is_traced_as_a_whole(function):
    exported = export(Calls(function))
    assert operators(functional(export(Calls(function)))) == operators(exported.run_decompositions({}))


def test_a_size_that_turns_out_to_be_fixed_is_a_number(wholes):
    result = functional(export(Calls(of_one_size)))
    assert not list(result.graph.find_nodes(op="call_function", target=aten.sym_size.int))
    assert not wholes
    x = torch.randn(3, 8)
    assert torch.equal(run(result, x), of_one_size(x))


def test_a_piece_that_cannot_be_traced_costs_time_only(monkeypatch, wholes):
    def refuses(function):
        raise RuntimeError("no")

    monkeypatch.setattr(module, "make_fx", refuses)
    x = torch.randn(4, 8)
    assert torch.equal(run(functional(export(Calls(rotary))), x), rotary(x))
    assert wholes


def test_a_write_to_an_input_is_left_to_be_refused(wholes):
    functional(export(Calls(lambda x: x.add_(1) * 2)))
    assert wholes
