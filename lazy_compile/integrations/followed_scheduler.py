"""Schedulers of diffusers that are followed: lazy models learn what each step made of the latents."""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor

from lazy_compile.runtime.trajectory import Trajectories

_FOLLOWERS: WeakKeyDictionary[Any, WeakSet[Trajectories]] = WeakKeyDictionary()


def follow(scheduler: Any, trajectories: Trajectories) -> None:
    """Let trajectories know of every step of a scheduler from now on.

    Its class becomes one of the same name that is derived from it. A copy of it is of the original class, and is not
    followed.
    """
    kind: Any = type(scheduler)
    if not callable(getattr(kind, "step", None)):
        return
    if not hasattr(kind, _ORIGINAL):
        with suppress(TypeError):  # a class with slots, or written in C
            scheduler.__class__ = _followed(kind)
    _FOLLOWERS.setdefault(scheduler, WeakSet()).add(trajectories)


def unfollow(scheduler: Any, trajectories: Trajectories) -> None:
    """Tell them no more; a scheduler that nobody follows is of its own class again."""
    followers = _FOLLOWERS.get(scheduler, WeakSet())
    followers.discard(trajectories)
    if not followers and hasattr(type(scheduler), _ORIGINAL):
        scheduler.__class__ = getattr(type(scheduler), _ORIGINAL)


def _unfollowed(kind: type) -> Any:
    return object.__new__(kind)


_ORIGINAL = "_lazy_compile_original"


@functools.cache
def _followed(kind: type) -> type:
    original: Any = kind.step  # type: ignore[attr-defined]
    signature = inspect.signature(original)

    @functools.wraps(original)  # pipelines read its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        followers = list(_FOLLOWERS.get(self, ()))
        before = signature.bind(self, *args, **kwargs).arguments.get("sample") if followers else None
        after = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            for trajectories in followers:
                trajectories.note_step(before, after)
        return result

    def reduce(self: Any, protocol: Any) -> Any:
        return _unfollowed, (kind,), self.__dict__

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**names, "step": step, "__reduce_ex__": reduce, _ORIGINAL: kind})
