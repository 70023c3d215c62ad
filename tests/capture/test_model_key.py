"""Under which key a capture is kept: another one for every model, and call, that may have another graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.capture_folder import CaptureFolder
from support import kept_models
from support.kept_models import Toy, call, toy
from support.layers import WIDTH


def set_plain(model: Toy) -> None:
    model.factor = 1.5


def set_variable(model: Toy) -> None:
    kept_models.SCALE = 500.0


def set_type(model: Toy) -> None:
    model.double()


def add_hook(model: Toy) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, result: result * 2)


def set_shape(model: Toy) -> None:
    model.table = torch.linspace(1, 2, 1)


def set_method(model: Toy) -> None:
    model.condition = lambda t: t[:, None].expand(-1, WIDTH) / 10  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [set_plain, set_variable, set_type, add_hook, set_shape, set_method])
def test_another_model_has_another_key(change: Callable[[Toy], None]) -> None:
    folder = CaptureFolder(Path("anywhere"))
    layout, tensors = CallLayout.of((), call())
    before = folder.entries(toy(), layout, tensors).folder
    try:
        model = toy()
        change(model)
        assert folder.entries(model, layout, tensors).folder != before
    finally:
        kept_models.SCALE = 1000.0
    assert folder.entries(toy(), layout, tensors).folder == before


def test_what_is_no_tensor_is_in_the_key() -> None:
    folder = CaptureFolder(Path("anywhere"))
    places = [
        folder.entries(toy(), *CallLayout.of((), {**call(), "scale": value}), False).folder
        for value in (1, 1.0, True, None, "1", 2)
    ]
    assert len(set(places)) == len(places)
