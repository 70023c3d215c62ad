"""Models that read the values of their inputs: captured for one answer, and again by themselves for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import CacheSchedule, Scheduled
from lazy_compile.backends.denoiser import EngineDenoiser
from lazy_compile.backends.onnxruntime.runner import OnnxRunner
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_model import STRATEGIES, capture
from lazy_compile.capture.captured import Capture
from lazy_compile.errors import CaptureError
from lazy_compile.ir.program import module_state
from support.captures import accepts, captured_call
from support.layers import TOKENS, WIDTH
from support.small_model import SMALL, Small, Wraps, reused, run, same
from support.toy_models import call, randomize

GUARDED = "export, dynamic sizes, guarded values"


class Reads(nn.Module):
    """A function of ``x`` and of what it reads from ``y`` on the way."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(self.function(x, y))


def captured(model: nn.Module, **arguments: Any) -> Capture:
    layout, tensors = CallLayout.of((), arguments)
    return capture(model.eval(), layout, tensors)


def answer(found: Capture, model: nn.Module, **arguments: Tensor) -> Tensor:
    with torch.no_grad():
        return found.program.graph_module(*found.program.bind(module_state(model), list(arguments.values())))[0]


X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(3, 5)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
OTHER_MASK = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])  # with the same sums
SHORTER = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def by_condition(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 if (y == 1).all() else -x


def by_lengths(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x, y.sum(dim=1).tolist(), strict=True)])


def by_array(x: Tensor, y: Tensor) -> Tensor:
    return x[:, : int(y.cpu().numpy().sum(axis=1).max())]


def by_mask(x: Tensor, y: Tensor) -> Tensor:
    return x[y.bool()]


def by_rows_of_the_mask(x: Tensor, y: Tensor) -> Tensor:
    rows = [torch.cat([row[keep], row[~keep]]) for row, keep in zip(x, y.bool(), strict=True)]
    return torch.stack(rows)


def by_positions(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(0, 1)[torch.nonzero(y.flatten()).squeeze(1)]


def by_positions_of_each_axis(x: Tensor, y: Tensor) -> Tensor:
    rows, columns = y.nonzero(as_tuple=True)
    return x[rows, columns]


def by_repeats(x: Tensor, y: Tensor) -> Tensor:
    return (x + 1).repeat_interleave(y[0] + 1, dim=1)


def by_bounds(x: Tensor, y: Tensor) -> Tensor:
    lengths = y.sum(dim=1)
    kept = torch.zeros_like(x)
    for row in range(3):
        kept[row, : lengths[row]] = x[row, : lengths[row]]
    return kept


def by_what_is_written_in_place(x: Tensor, y: Tensor) -> Tensor:
    lengths = y.new_zeros(3)
    for row in range(3):
        lengths[row] = y[row].sum()
    lengths += 0
    return x[:, : int(lengths.max())]


@pytest.mark.parametrize(
    ("function", "alike", "other"),
    [
        (by_condition, SHORTER, ONES),
        (by_lengths, OTHER_MASK, SHORTER),
        (by_array, MASK, torch.zeros(3, 5).long() + MASK[2]),
        (by_mask, MASK, SHORTER),
        (by_rows_of_the_mask, MASK, OTHER_MASK),
        (by_positions, MASK, SHORTER),
        (by_positions_of_each_axis, MASK, SHORTER),
        (by_repeats, MASK, SHORTER),
        (by_bounds, OTHER_MASK, SHORTER),
        (by_what_is_written_in_place, OTHER_MASK, torch.zeros(3, 5).long() + MASK[2]),
    ],
)
def test_a_graph_serves_the_calls_that_answer_alike(
    function: Callable[[Tensor, Tensor], Tensor], alike: Tensor, other: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lazy_compile.capture.capture_model.STRATEGIES", [strategy for strategy in STRATEGIES if strategy.reads_values]
    )
    model = randomize(Reads(function))
    found = captured(model, x=X, y=MASK)
    assert found.strategy == GUARDED
    assert found.values.inputs == (1,)
    assert found.accepts([X, MASK])
    assert found.accepts([X + 1, alike])
    assert not found.accepts([X, other.to(MASK.dtype)])
    with torch.no_grad():
        for y in (MASK, alike):
            assert torch.equal(answer(found, model, x=X + 1, y=y), model(X + 1, y))


def test_sizes_stay_dynamic_where_no_value_depends_on_them() -> None:
    model = randomize(Reads(by_condition))
    found = captured(model, x=X, y=MASK)
    x, y = torch.randn(7, 4, WIDTH), torch.zeros(7, 4).long()
    assert found.accepts([x, y])
    with torch.no_grad():
        assert torch.equal(answer(found, model, x=x, y=y), model(x, y))


def test_a_value_that_depends_on_sizes_only_needs_no_guard() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        rows, columns = torch.tensor(x.shape[:2]).tolist()
        return x.reshape(rows * columns, -1) + y.sum()

    found = captured(randomize(Reads(function)), x=X, y=MASK)
    assert not found.values
    assert found.accepts([X, SHORTER])


def test_what_was_spoiled_by_weights_is_known_no_longer() -> None:
    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            scores = torch.zeros_like(y, dtype=x.dtype)
            view = scores[0]
            scores[:] = self.linear(x).sum(-1)
            return x if view.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"decides by a value that depends on its weights, bool\(\) in forward"):
        captured(Spoils(), x=X, y=MASK)


def test_random_numbers_are_not_known() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return x if torch.rand_like(x).sum() > 1.0 else -x

    with pytest.raises(CaptureError, match="depends on its weights"):
        captured(Reads(function), x=X, y=MASK)


def test_values_of_a_tensor_without_storage_are_asked_for_in_vain() -> None:
    with torch.device("meta"):
        model, x, y = Reads(by_condition), torch.empty(3, 5, WIDTH), torch.empty(3, 5)
    with pytest.raises(CaptureError) as caught:
        captured(model, x=x, y=y)
    assert str(caught.value) == (
        "the model reads values of its inputs (bool), and inputs on the meta device have none; capture it with real "
        "tensors"
    )


# What the model holds itself --------------------------------------------------------------------------------------


class Causal(nn.Module):
    """Looks at its own mask, as ``nn.TransformerDecoder`` does, and at a table that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(5, 5).tril())
        self.table = torch.tensor([1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        is_causal = bool((self.mask == torch.ones(5, 5, device=x.device).tril()).all())
        x = self.linear(x) * self.table.tolist()[1]
        return x.cumsum(1) if is_causal else self.mask @ x


def test_what_a_model_reads_from_its_own_state_is_asked_again_where_that_was_written_to() -> None:
    model = randomize(Causal())
    found = captured(model, x=X)
    assert found.strategy == GUARDED
    assert not found.values
    assert len(found.state.sources) == 2
    with torch.no_grad():
        for rows in (1, 4):
            x = torch.randn(rows, 5, WIDTH)
            assert found.accepts([x])
            assert torch.equal(answer(found, model, x=x), model(x))
        asked = found.state._checked
        model.mask.mul_(1.0)
        assert found.accepts([X]), "it was written to, and says the same"
        assert found.state._checked is not asked
        model.mask[0, 1] = 1.0
        assert not found.accepts([X])
        model.mask[0, 1] = 0.0
        assert found.accepts([X])
        model.table += 1
        assert not found.accepts([X])


def test_a_buffer_that_was_replaced_is_read_again() -> None:
    model = randomize(Causal())
    found = captured(model, x=X)
    model.mask = model.mask.clone()
    assert found.accepts([X])
    model.mask = torch.ones(5, 5)
    assert not found.accepts([X])


def test_positions_that_a_buffer_selects_are_part_of_the_graph() -> None:
    class Selects(Causal):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x[:, self.mask[2] > 0]).repeat_interleave(self.mask[2, :3].long(), dim=1)

    model = randomize(Selects())
    found = captured(model, x=X)
    with torch.no_grad():
        assert torch.equal(answer(found, model, x=X), model(X))
        model.mask[2, 3] = 1.0
    assert not found.accepts([X])


def test_tied_weights_are_read_as_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)) if self.third.bias[0] > 0 else x)

    model = randomize(Tied())
    with torch.no_grad():
        model.third.bias[0] = 1.0
        found = captured(model, x=X)
        assert torch.equal(answer(found, model, x=X), model(X))
        model.third.bias[0] = -1.0
        assert not found.accepts([X])


def test_a_state_without_storage_is_read_in_vain() -> None:
    with torch.device("meta"):
        model, x = Causal(), torch.empty(3, 5, WIDTH)
    with pytest.raises(CaptureError, match=r"values of its weights \(bool\), and weights on the meta device have none"):
        captured(model, x=x)


# In a lazy model --------------------------------------------------------------------------------------------------


class Masked(Wraps):
    """Attends to as many tokens as the mask says."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return self.small(x[:, : int(mask.sum(1).max())], t)


def masked(tokens: int, step: int = 0) -> dict[str, Tensor]:
    return {**call(SMALL, step=step), "mask": (torch.arange(TOKENS) < tokens).expand(2, -1)}


def test_another_value_captures_again_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(Masked()).eval(), max_captures=2)
    for tokens in (16, 12, 12, 16, 8):
        assert same(run(lazy, [masked(tokens)]), run(lazy.original, [masked(tokens)]))
    assert lazy.stats.captures == 2  # no more are kept
    kept = lazy._store.graphs[0]
    run(lazy, [masked(16)])
    assert lazy.graph is kept, "the least recently used one went first"
    assert lazy.graph.guarded_inputs == ("mask",)
    (record,) = caplog.records
    assert record.getMessage() == (
        "Masked was captured again because it reads the values of mask, and they changed: each answer has a graph of "
        "its own, and at most 2 are kept (LazyConfig.max_captures)"
    )


def test_a_decoder_of_torch_with_masks_of_its_own_is_lazy() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(
                WIDTH, 2, 2 * WIDTH, activation="gelu", batch_first=True, norm_first=True
            )
            self.decoder = nn.TransformerDecoder(layer, 1)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))
            self.register_buffer("memory_mask", torch.zeros(5, 3))

        def forward(self, x: Tensor, t: Tensor, observed: Tensor) -> Tensor:
            x = x + t[:, None, None]
            return self.decoder(x, observed, tgt_mask=self.mask, memory_mask=self.memory_mask)

    model, (t, observed) = randomize(Decoder()).eval(), (torch.full((3,), 0.5), torch.randn(3, 3, WIDTH))
    lazy = lazy_compile.transform(model, (X, t, observed))
    assert [branch.kind.value for branch in lazy.branches] == ["self_attention", "cross_attention", "mlp"]
    assert all(branch.row_separable for branch in lazy.branches)
    with torch.no_grad():
        assert torch.equal(lazy(X, t, observed), model(X, t, observed))
        assert torch.equal(lazy(X[:1], t[:1], observed[:1]), model(X[:1], t[:1], observed[:1]))
        assert lazy.stats.captures == 1
        model.mask.zero_()
        assert torch.equal(lazy(X, t, observed), model(X, t, observed))
        assert lazy.stats.captures == 2


def test_an_exported_file_is_said_to_serve_one_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lazy = lazy_compile.transform(randomize(Masked()).eval(), masked(12))
    lazy_compile.export_onnx(lazy, tmp_path / "masked.onnx")
    assert [record.getMessage() for record in caplog.records] == [
        "the exported Masked is right only where it reads the same values from mask as from the example; "
        "export one file for each that you need"
    ]
    denoiser = EngineDenoiser(OnnxRunner(tmp_path / "masked.onnx"))
    assert torch.allclose(denoiser(**masked(12)), run(lazy.original, [masked(12)])[0], atol=1e-4)


def test_a_model_that_decides_by_its_time_keeps_one_trajectory() -> None:
    class Decides(Small):
        """Leaves out the text half-way, as some samplers do."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x if t.max() > 500 else x * 0.5, t)

    lazy = lazy_compile.transform(randomize(Decides()).eval())
    calls = [call(SMALL, step=step, steps=6) for step in range(6)]
    assert same(run(lazy, calls), run(lazy.original, calls))
    assert lazy.stats.captures == 2
    lazy.policy = Scheduled(CacheSchedule.every(2, steps=6, branches=2))
    run(lazy, calls)
    assert [row[0] for row in reused(lazy)] == [0.0, 1.0] * 3


class UpToTheLongest(Small):
    """The largest and the smallest number of a tensor, by Python's own functions."""

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x[:, : max(lengths)] * (1 + 0.1 * min(lengths)), t)


def test_the_largest_of_one_tensor() -> None:
    model, lengths = randomize(UpToTheLongest()).eval(), torch.tensor([12, 9])
    x, t = torch.ones(2, 16, WIDTH), torch.ones(2)
    found = captured_call(model, x=x, t=t, lengths=lengths)
    assert accepts(found, x=x, t=t, lengths=lengths.flip(0))
    assert accepts(found, x=x, t=t, lengths=torch.tensor([8, 12]))  # the smallest is computed with
    assert not accepts(found, x=x, t=t, lengths=torch.tensor([11, 9]))
