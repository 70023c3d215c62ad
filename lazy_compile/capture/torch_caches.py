"""What torch remembers of a capture, and never needs again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def torch_caches_freed() -> Iterator[None]:
    """Empty torch's caches of operators on fake tensors and of symbolic sizes afterwards.

    Their keys hold the symbols of one capture, so that no other one finds anything there, and they grow with each.
    """
    try:
        yield
    finally:
        FakeTensorMode.cache_clear()
        for method in vars(ShapeEnv).values():
            if callable(clear := getattr(method, "cache_clear", None)):
                clear()
