"""Whether a model is what it was, asked cheaply, and answered as by looking at all of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lazy_compile.capture.model_snapshot import ModelWatch


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Sequential(nn.LayerNorm(2)))
    model.options = {"heads": 2, "sizes": [1, 2, (3, [4])]}  # type: ignore[assignment]
    model.scale = torch.tensor([1.0, 2.0])
    model.table = np.ones(3)  # type: ignore[assignment]
    model.limit = 2.0  # type: ignore[assignment]
    return model


def _replace_hooks(model: Any) -> None:
    model[0]._forward_hooks = OrderedDict()
    model[0].register_forward_hook(lambda *args: None)


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda model: setattr(model, "limit", 3.0),
    "a new attribute": lambda model: setattr(model[2], "added", 1),
    "an attribute that is gone": lambda model: delattr(model, "limit"),
    "an entry of a dictionary": lambda model: model.options.update(heads=4),
    "a new entry": lambda model: model.options.update(more=4),
    "an entry deep inside": lambda model: model.options["sizes"][2][1].append(5),
    "a module": lambda model: model.__setitem__(1, nn.Identity()),
    "a new module": lambda model: model.append(nn.Identity()),
    "a hook": lambda model: model[0].register_forward_hook(lambda *args: None),
    "a hook before": lambda model: model[2][0].register_forward_pre_hook(lambda *args: None),
    "hooks that were replaced": _replace_hooks,
    "the type of weights": lambda model: model.half(),
    "a tensor": lambda model: setattr(model, "scale", torch.tensor([1.0, 2.0])),
    "an array": lambda model: setattr(model, "table", np.ones(3)),
    "a method": lambda model: setattr(model[0], "forward", lambda x: x),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str) -> None:
    model = _model()
    watch = ModelWatch(model)
    assert watch.still_holds()
    CHANGES[what](model)
    assert not watch.still_holds()


def test_what_is_of_no_account_is_looked_at_once() -> None:
    model = _model()
    watch = ModelWatch(model)
    for change in (model.eval, lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(2, 2)))):
        change()
        assert watch.still_holds()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lazy_compile.capture.model_snapshot.observe", lambda model: 1 / 0)
            assert watch.still_holds()


def test_what_equals_what_lay_there_must_go_on_to_do_so() -> None:
    model = _model()
    watch = ModelWatch(model)
    model.limit = limit = torch.tensor(2.0)  # type: ignore[assignment]
    watch.still_holds()
    limit.fill_(3.0)
    assert not watch.still_holds()
