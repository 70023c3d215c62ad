"""The zoo: small configurations of model classes, by name. A file `models_*.py` here registers them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

Family = tuple[nn.Module, dict[str, Any]]
"""A model, and the keyword arguments of one call: the latents first, and two rows where it takes a batch. Nothing but
the batch has the size 2 on a first axis or in a list, so that single rows can be told."""

Build = Callable[[], Family]

_ZOO: dict[str, Build] = {}


def zoo_model(name: str) -> Callable[[Build], Build]:
    """Register a builder under `name`: the class name, with a suffix where a class comes in several configurations."""

    def register(build: Build) -> Build:
        if name in _ZOO:
            raise ValueError(f"two zoo models are called {name}")
        _ZOO[name] = build
        return build

    return register


def zoo() -> dict[str, Build]:
    """Every registered builder, sorted by name."""
    for file in sorted(Path(__file__).parent.glob("models_*.py")):
        importlib.import_module(f"zoo.{file.stem}")
    return dict(sorted(_ZOO.items()))
