"""A process that forks while threads sample."""

from __future__ import annotations

import os
import time
import warnings

import pytest

from lazy_compile.capture.lock import CAPTURE_LOCK
from lazy_compile.runtime import stats
from support.small_model import NEVER, SMALL, fresh, run
from support.toy_models import trajectory


def test_a_child_goes_on_whatever_locks_were_held() -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=3)
    lazy.policy = NEVER
    run(lazy, calls)
    with lazy._trajectories._mutex, CAPTURE_LOCK._changed, stats._RECORDING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of every fork beside threads
        child = os.fork()
        if child == 0:
            run(lazy, calls)
            os._exit(0)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for ever")
    assert status == 0
