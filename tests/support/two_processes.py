"""Two processes that exchange tensors through gloo, as GPUs do through NCCL."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

PROCESSES, PATIENCE = 2, 240.0
ROOT = Path(__file__).parents[2]


def together(work: Callable[[], Any], folder: Path, seconds: float = PATIENCE) -> list[Any]:
    """What each of two processes returns.

    They begin anew and import the module of ``work``, a function of it or a partial of one: a fork of a process whose
    autograd has threads hangs. What they cannot do in time they will never do: they wait for each other.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])  # where pytest has test modules from; handed on
        context = start_processes(  # type: ignore[no-untyped-call]
            _begin, args=(work, str(folder), seconds), nprocs=PROCESSES, join=False, start_method="spawn"
        )
    end = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"no answer after {seconds:.0f} s: the processes wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def _begin(rank: int, work: Callable[[], Any], folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=seconds)
    )
    torch.save(work(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
