"""Captures change global state of torch and of the model: one at a time, and none while a lazy model runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CaptureLock:
    """Many threads may run, or one may capture.

    A thread that captures during a run lets other captures go first; a capture that waits keeps new runs back.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Nobody runs and nobody captures, as in a child of fork, which has one thread."""
        self._changed = threading.Condition()
        self._local = threading.local()
        self._running = 0
        self._waiting = 0
        self._capturing = False

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._is_inside:
            yield
            return
        self._start_running(lambda: not self._capturing and not self._waiting)
        try:
            yield
        finally:
            self._stop_running()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        if getattr(self._local, "captures", False):
            yield
            return
        was_running = self._is_inside
        if was_running:
            self._stop_running()
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._capturing and not self._running)
            self._waiting -= 1
            self._capturing = self._local.captures = True
        try:
            yield
        finally:
            with self._changed:
                self._capturing = self._local.captures = False
                self._changed.notify_all()
            if was_running:
                self._start_running(lambda: not self._capturing)

    @property
    def _is_inside(self) -> bool:
        return getattr(self._local, "runs", False) or getattr(self._local, "captures", False)

    def _start_running(self, allowed: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(allowed)
            self._running += 1
        self._local.runs = True

    def _stop_running(self) -> None:
        self._local.runs = False
        with self._changed:
            self._running -= 1
            self._changed.notify_all()


CAPTURE_LOCK = CaptureLock()
"""Shared by all lazy models of the process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CAPTURE_LOCK.renew)
