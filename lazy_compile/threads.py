"""How many threads PyTorch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread while it lasts.

    A small model gains nothing from a second one, and loses much where another process wants its core; a timing loses
    its meaning there, most of all where two runtimes keep threads of their own that wait by spinning.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
