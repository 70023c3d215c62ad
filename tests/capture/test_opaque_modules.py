"""Modules that torch.export cannot look into: each is one operator, which calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule
from lazy_compile.capture.opaque_modules import OpaqueModules, culprit, parent_of
from lazy_compile.capture.opaque_probe import RecordedCall, Unsuitable, probe
from lazy_compile.errors import BackendError, CaptureError
from lazy_compile.ir.opaque import OpaqueCall
from support.expert_models import (
    AttentionByItem,
    CapacityExperts,
    Denoiser,
    Experts,
    ExpertsByItem,
    KernelWithoutShapes,
    ScriptedMLP,
    SpectrumInNumPy,
)
from support.layers import MLP, WIDTH, norm
from support.toy_models import randomize

BRANCHES = [("attns.0", "self_attention"), ("mlps.0", "mlp"), ("attns.1", "self_attention"), ("mlps.1", "mlp")]


def inputs(batch: int = 2, tokens: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(batch)), torch.full(
        (batch,), 500.0
    )


def transformed(kind: type[nn.Module], attention: type[nn.Module] | None = None) -> tuple[nn.Module, LazyModule]:
    model = randomize(Denoiser(kind) if attention is None else Denoiser(kind, attention)).eval()
    return model, lazy_compile.transform(model, inputs())


@pytest.fixture(scope="module")
def experts() -> tuple[nn.Module, LazyModule]:
    return transformed(Experts)


def check(model: nn.Module, lazy: LazyModule) -> None:
    """Exact at other sizes too, on one graph, with every branch found."""
    lazy.reset()
    with torch.no_grad():
        for call in (inputs(), inputs(3, 12)):
            assert torch.equal(lazy(*call), model(*call))
    assert len(lazy._store.graphs) == 1
    assert [(branch.name, branch.kind.value) for branch in lazy.branches] == BRANCHES


def test_experts_that_are_counted_in_python(experts: tuple[nn.Module, LazyModule]) -> None:
    model, lazy = experts
    check(model, lazy)
    assert lazy.graph.captured.strategy == "export, dynamic sizes, opaque mlps.0 and 1 more"
    assert all(branch.row_separable for branch in lazy.branches)
    attention, mlp = lazy.branches[:2]
    tokens, products = 2 * 16, 2 * WIDTH * 2 * WIDTH
    assert mlp.macs == tokens * (3 * products + 4 * WIDTH)  # two chosen experts, the one for all, and the router
    assert attention.macs > 0


@pytest.mark.parametrize("kind", [ExpertsByItem, KernelWithoutShapes, ScriptedMLP])
def test_other_reasons(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lazy_compile")
    model, lazy = transformed(kind)
    check(model, lazy)
    (line,) = [record.getMessage() for record in caplog.records if "since" in record.getMessage()]
    reason = {
        ExpertsByItem: "it decides by a value that depends on its weights, item() in run, expert_models.py:",
        KernelWithoutShapes: "lazy_compile_tests::swish",
        ScriptedMLP: "it calls SCRIPTED_GATE, which torch.jit compiled",
    }[kind]
    assert line.startswith("Denoiser: opaque mlps.0 and 1 more, since ")
    assert reason in line


def test_an_attention_is_one(experts: tuple[nn.Module, LazyModule]) -> None:
    model, lazy = transformed(MLP, AttentionByItem)
    check(model, lazy)
    assert len(lazy.graph.captured.opaque) == 2
    assert lazy.branches[0].row_separable


def test_what_is_reused_is_not_called(experts: tuple[nn.Module, LazyModule]) -> None:
    model, lazy = experts
    lazy.policy = CacheSchedule.every(2, steps=4, branches=4)
    calls: list[int] = []
    handles = [mlp.experts[0].register_forward_hook(lambda *_: calls.append(1)) for mlp in model.mlps]
    try:
        lazy = lazy_compile.transform(model, inputs(), policy=lazy.policy)
        x, t = inputs()
        before = len(calls)
        with torch.no_grad():
            for step in range(2):
                with lazy.trajectory("one", step=step):
                    lazy(x * (1 - 0.01 * step), t - step)
        assert len(calls) - before == 2
        assert lazy.stats.reuse_table.tolist() == [[0.0] * 4, [1.0] * 4]
    finally:
        for handle in handles:
            handle.remove()


def test_gradients_pass(experts: tuple[nn.Module, LazyModule]) -> None:
    model, lazy = experts
    x, t = inputs()
    found = []
    for run in (model, lazy):
        leaf = x.clone().requires_grad_()
        weights = [model.mlps[0].route.weight, model.mlps[1].experts[2].up.weight, model.attns[0].q.weight]
        lazy.reset()
        found.append(torch.autograd.grad(run(leaf, t).square().sum(), [leaf, *weights]))
    for seen, expected in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected)
        assert expected.abs().max() > 0


def test_weights_are_followed(experts: tuple[nn.Module, LazyModule]) -> None:
    model, lazy = experts
    weight = model.mlps[0].experts[1].down.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        lazy.reset()
        assert torch.equal(lazy(*inputs()), model(*inputs()))
        weight.copy_(before)


def test_a_file_would_not_hold_it(experts: tuple[nn.Module, LazyModule], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"mlps\.0 runs as it is, in Python, since it decides by a value") as caught:
        lazy_compile.export_onnx(experts[1], tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


class Picks(nn.Module):
    """Gives a number, by which the block around it decides."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> int:
        return int(self.score(x).mean().item() > 0)


class PickedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick, self.mlps = Picks(), nn.ModuleList([MLP(), MLP()])

    def forward(self, x: Tensor) -> Tensor:
        return self.mlps[self.pick(x)](x)


def test_what_returns_no_tensors_takes_in_the_module_around_it() -> None:
    model, lazy = transformed(PickedMLP)
    check(model, lazy)
    assert [call.path for call in lazy.graph.captured.opaque] == ["mlps.0", "mlps.1"]


# What is learned of a module by itself ----------------------------------------------------------------------------


def known(module: nn.Module, *tensors: Tensor) -> OpaqueCall:
    with torch.no_grad():
        call, _ = RecordedCall.of(module.forward, tensors, {})
        return probe(call, module, "part", "it was asked for", ())


def test_rows_that_depend_on_each_other_are_seen() -> None:
    x = inputs()[0]
    assert known(randomize(Experts()), x).rows == "any"
    assert known(randomize(CapacityExperts()), x).rows == "none"
    assert known(Normalises(), x).rows == "none"
    assert known(Windows(), x.flatten(0, 1)).rows == "blocks"


class Normalises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return norm(x) / x.std(0).mean()


class Windows(nn.Module):
    """Attends within windows of 16 lines."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(0, (-1, 16))
        return torch.nn.functional.scaled_dot_product_attention(h, h, h).flatten(0, 1)


class Sizes(nn.Module):
    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = image.flatten(2).transpose(1, 2)
        return tokens[:, ::1], torch.cat([vector, vector.new_ones(len(vector), 3)], 1), tokens.mean()


def test_sizes_follow_from_those_of_the_inputs() -> None:
    call = known(Sizes(), torch.randn(2, 4, 6, 10), torch.randn(2, 7))
    values = call.outputs
    assert [output.empty([torch.ones(3, 4, 2, 5), torch.ones(3, 9)]).shape for output in values] == [
        (3, 10, 4), (3, 12), (),
    ]  # fmt: skip
    assert values[0].empty([torch.ones(3, 4, 2, 5), torch.ones(3, 9)]).stride() == (40, 1, 10)
    assert call.rows == "none"


class Widths(nn.Module):
    """As many columns as there are bits in the number of lines."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(len(x), 3 * len(x) ** 2)


def test_sizes_that_are_not_understood_are_fixed() -> None:
    call = known(Widths(), torch.ones(4, 2))
    assert call.fixed == ((4, 2),)
    with pytest.raises(ValueError, match=r"part was seen with inputs of shapes \[\(4, 2\)\] alone"):
        torch.ops.lazy_compile.opaque(call.handle, [torch.ones(5, 2, device="meta")], [])


class ShorterLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keep = 4

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.keep]


def test_a_result_of_another_size_is_an_error() -> None:
    module = ShorterLater()
    call = known(module, torch.ones(2, 8, 3))
    module.keep = 5
    with pytest.raises(CaptureError, match=r"part returned float32\[2, 5, 3\], and \[\[2, 4, 3\]\] was expected"):
        torch.ops.lazy_compile.opaque(call.handle, [torch.ones(2, 8, 3)], [])


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


@pytest.mark.parametrize(
    ("kind", "why"), [(Noisy, "something else when it is called again"), (Writes, "writes to its")]
)
def test_what_is_no_function_is_no_operator(kind: type[nn.Module], why: str) -> None:
    with pytest.raises(Unsuitable, match=why):
        known(kind(), torch.ones(2, 8, 3))


def test_a_result_that_is_an_input_is_copied() -> None:
    call = known(nn.Identity(), torch.ones(2, 3))
    given = torch.ones(2, 3)
    (seen,) = torch.ops.lazy_compile.opaque(call.handle, [given], [])
    assert torch.equal(seen, given)
    assert seen.data_ptr() != given.data_ptr()


def test_where_an_export_failed() -> None:
    model = Denoiser(PickedMLP)
    with pytest.raises(TypeError) as caught:
        model.mlps[1].pick("no tensor")
    assert culprit(model, caught.value) == "mlps.1.pick.score"
    assert culprit(model, ValueError()) is None
    assert parent_of(model, "mlps.1.mlps.0") == "mlps.1"
    assert parent_of(model, "mlps.1") == ""
    opaque = OpaqueModules(model).with_module("mlps.1.pick", "a").with_module("mlps.1", "b")
    assert opaque.reasons == {"mlps.0": "b", "mlps.1": "b"}


@pytest.mark.slow
def test_numpy_within_a_module() -> None:
    model, lazy = transformed(SpectrumInNumPy)
    with torch.no_grad():
        torch.testing.assert_close(lazy(*inputs()), model(*inputs()), rtol=0, atol=1e-4)
    assert [(branch.name, branch.kind.value) for branch in lazy.branches] == BRANCHES
