"""How a model is run for a capture: in evaluation mode, quietly, and without a trace."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn

from lazy_compile.capture.restored_tensors import same_random_numbers


@contextmanager
def quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without export's chatter; the model's own flags come back afterwards."""
    training = [module for module in model.modules() if module.training]
    loggers = [logging.getLogger(f"torch.{name}") for name in ("_export", "export", "fx", "_subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    try:
        for module in training:
            module.training = False
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in training:
            module.training = True
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def comparable_evaluation(model: nn.Module) -> Iterator[None]:
    """The same, for two calls that are held against each other: they draw the same random numbers, and what the author
    of a module has compiled is not, since a compiled module rounds otherwise."""
    with quiet_evaluation(model), same_random_numbers(), torch.compiler.set_stance("force_eager"):
        yield


def first_line(error: Exception) -> str:
    """``"ValueError: what it says"``, at most 300 characters of it; of a message in several short lines, all of them,
    since the last says what is wrong (einops names the pattern first, then the shape, then the trouble)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    said = " ".join(lines) if len(lines) <= _SHORT_MESSAGE else lines[0]
    return f"{type(error).__name__}: {said}"[:300]


_SHORT_MESSAGE = 4
"""Lines of a message; longer ones bring a trace or a graph."""


@contextmanager
def other_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context a module runs another ``forward``."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
