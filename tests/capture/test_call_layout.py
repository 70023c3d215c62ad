"""What two calls must share to run on one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lazy_compile.capture.call_layout import CallLayout


def test_a_layout_names_its_tensors_and_builds_the_call_again() -> None:
    x, t, size = torch.ones(2), torch.zeros(3), torch.ones(4)
    arguments = {"x": x, "extra": {"size": size, "scale": 3.0}, "pair": (t, None), "flag": True}
    layout, tensors = CallLayout.of((t,), arguments)
    assert layout.names == ("args.0", "x", "extra.size", "pair.0")
    assert [id(tensor) for tensor in tensors] == [id(each) for each in (t, x, size, t)]
    other = [tensor + 1 for tensor in tensors]
    args, kwargs = layout.rebuild(other)
    assert torch.equal(args[0], t + 1)
    assert kwargs["extra"]["scale"] == 3.0
    assert kwargs["pair"] == (other[3], None)
    assert list(kwargs) == ["x", "extra", "pair", "flag"]


def test_layouts_differ_by_what_is_not_a_tensor() -> None:
    def layout(**arguments: Any) -> CallLayout:
        return CallLayout.of((), arguments)[0]

    x = torch.ones(2)
    assert layout(x=x, flag=True) == layout(x=torch.zeros(5, 7), flag=True)
    assert layout(x=x, flag=True) != layout(x=x, flag=False)
    assert layout(x=x, flag=True) != layout(x=x, flag=None)
    assert layout(x=x) != layout(y=x)
    assert layout(x=x, scale=1.0) != layout(x=x, scale=2.0)
    assert layout(x=x, mask=None) != layout(x=x, mask=x)


def test_a_switch_is_no_number_and_an_array_is_itself() -> None:
    def layout(**arguments: Any) -> CallLayout:
        return CallLayout.of((), arguments)[0]

    assert layout(flag=True) != layout(flag=1)
    assert layout(scale=1) != layout(scale=1.0)
    table = np.ones(3)
    assert layout(table=table) == layout(table=table)
    assert layout(table=table) != layout(table=np.ones(3))


def test_layouts_may_differ_in_numbers_only() -> None:
    def layout(**arguments: Any) -> CallLayout:
        return CallLayout.of((), arguments)[0]

    x = torch.ones(2)
    first = layout(x=x, scale=1.0, flag=True)
    assert first.changed_numbers(layout(x=x, scale=2, flag=True)) == ("scale",)
    assert first.changed_numbers(first) == ()
    assert first.changed_numbers(layout(x=x, scale=2.0, flag=False)) == ()
    assert first.changed_numbers(layout(x=x, scale="2", flag=True)) == ()
    assert first.changed_numbers(layout(x=x, scale=x, flag=True)) == ()
    assert first.changed_numbers(layout(x=x, size=2.0, flag=True)) == ()
    assert first.changed_numbers(layout(x=x, scale=2.0)) == ()


def test_a_number_may_be_passed_as_a_tensor_of_its_own_precision() -> None:
    x = torch.ones(2)
    layout, tensors = CallLayout.of((), {"x": x, "t": 0.1, "more": {"count": 3}}, {"t", "more.count"})
    assert layout.names == ("x", "t", "more.count")
    assert [(tensor.dtype, tensor.shape) for tensor in tensors[1:]] == [(torch.float64, ()), (torch.int64, ())]
    assert [tensor.item() for tensor in tensors[1:]] == [0.1, 3]
    assert layout == CallLayout.of((), {"x": x, "t": 0.7, "more": {"count": 4}}, {"t", "more.count"})[0]
    assert layout != CallLayout.of((), {"x": x, "t": 1, "more": {"count": 4}}, {"t", "more.count"})[0]
    assert layout != CallLayout.of((), {"x": x, "t": torch.tensor(0.1), "more": {"count": 4}}, {"t", "more.count"})[0]
    assert layout.numbers == {}
    assert [tensor is other for tensor, other in zip(layout.stand_ins(tensors), tensors[1:], strict=True)] == [True] * 2
    _, kwargs = layout.rebuild(tensors)
    assert kwargs["more"]["count"] is tensors[2]
