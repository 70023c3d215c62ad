"""What a process that ends at once leaves behind: the folder as it is before every change that a writer makes to it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")


def in_child(work: Callable[[], Any]) -> int:
    """Run it in a forked process; returns its number at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of every fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def states(write: Callable[[], Any], folder: Path, copies: Path) -> list[Path]:
    """Copies of ``folder`` as others see it before each change that ``write`` makes to it, in order.

    They are what a ``kill -9`` at that moment leaves, since the system keeps what a process has handed to it; what
    lies in buffers of the process is not there. The process has ended when they are looked at.
    """
    copies.mkdir()

    def watched() -> None:
        copying = False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal copying
            if not copying and _changes(event, arguments, folder):
                copying = True
                shutil.copytree(folder, copies / f"{len(os.listdir(copies)):04}", symlinks=True)
                copying = False

        sys.addaudithook(hook)
        write()

    if not ended_well(in_child(watched)):
        raise AssertionError("the writer itself failed")
    return sorted(copies.iterdir())


def _changes(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & OPENED_TO_WRITE)
        return writes and _inside(path, folder)
    return event in CHANGES and any(_inside(path, folder) for path in arguments[:2])


def _inside(path: object, folder: Path) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)


def kill_at_random(write: Callable[[], Any], longest: float, rng: random.Random) -> bool:
    """Whether a writer was still at work when it was killed."""
    child = in_child(write)
    time.sleep(rng.uniform(0.0, longest))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
