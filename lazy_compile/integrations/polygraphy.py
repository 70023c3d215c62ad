"""A runner for ``polygraphy run``: a lazy model whose caches are handed from one iteration to the next.

polygraphy run model.onnx --lazy --lazy-every 2 --iterations 6
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from lazy_compile.backends.open_runner import open_runner
from lazy_compile.errors import ConfigError
from lazy_compile.policies.policy import GATES, AlwaysCompute, Policy, spread
from lazy_compile.policies.presets import EveryNth
from lazy_compile.runtime import artifact


class LazyRunner(BaseRunner):  # type: ignore[misc]
    """What ``export_onnx`` or ``build_engine`` wrote; every inference is the next step of one trajectory.

    Args:
        path: an ``.onnx`` or ``.ort`` file, or an engine.
        every: compute at every so-maniest iteration, reuse in between.
        gates: a folder that ``plan`` or ``calibrate`` wrote, to decide instead. Without either the file's own policy is
            followed.
    """

    def __init__(self, path: str, every: int | None = None, gates: str | None = None, name: str | None = None) -> None:
        super().__init__(name=name, prefix="lazy-runner")
        if every is not None and (gates is not None or every < 1):
            raise ConfigError(f"--lazy-every is {every}, a number from 1 on, or --lazy-gates decides; give one of them")
        self._path = path
        self._given: Policy | None = None if every is None else EveryNth(1, every)
        if gates is not None:
            self._given = artifact.read(gates).policy

    def activate_impl(self) -> None:
        self.runner = open_runner(Path(self._path))
        self._policy = self._given or self.runner.policy or AlwaysCompute()
        self._policy.check(self.runner.branches)
        if reason := self.runner.metadata.refusal(self._policy):
            raise ConfigError(reason)
        G_LOGGER.info(f"{self.name} | {self._policy.describe()}")
        self.memory: dict[str, object] = {}
        self.step = self.reused = 0
        self.before: float | None = None

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for spec in self.runner.metadata.inputs:
            metadata.add(spec.name, DataType.from_dtype(getattr(torch, spec.dtype)), spec.shape)
        return metadata

    def infer_impl(self, feed_dict: Any) -> Any:
        time_input = self.runner.metadata.timestep_input
        tensors = {name: torch.as_tensor(value) for name, value in feed_dict.items()}
        timestep = float(self.step) if time_input is None else float(tensors[time_input].max())
        row = self._policy.row(timestep, self.before)
        decided = self._policy.decisions(self.step, timestep, self.before, self.memory)
        force = spread(decided, len(self.runner.branches))
        slopes = self._policy.slopes(self.step, timestep, self.before)
        start = time.perf_counter()
        outputs = self.runner.run(tensors, row, force, slopes=slopes)
        self.inference_time = time.perf_counter() - start
        self.step, self.before = self.step + 1, timestep
        decisions = self.runner.decisions
        self.reused += int((~decisions).sum())
        if self._policy.reads_gates and self._policy.known_before_step:
            self.memory[GATES] = self.runner.decided_by(None, self.runner.logits).tolist()
        names = [name for name in self.runner.metadata.outputs if name is not None]
        return OrderedDict((name, output.cpu().numpy()) for name, output in zip(names, outputs, strict=True))

    def deactivate_impl(self) -> None:
        asked = self.step * len(self.runner.branches)
        G_LOGGER.info(f"{self.name} | lazy ratio {self.reused / max(asked, 1):.3f} of {asked} branch evaluations")
        del self.runner


class LazyRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
    """
    Lazy Inference: running a lazy model, with its caches handed from one iteration to the next

    Depends on:

        - ModelArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "lazy_compile", "lazy"

    def add_parser_args_impl(self) -> None:
        self.group.add_argument("--lazy-every", type=int, help="Compute at every so-maniest iteration only.")
        self.group.add_argument("--lazy-gates", help="Folder that lazy-compile plan or calibrate wrote, to decide.")

    def parse_impl(self, args: Any) -> None:
        self.every, self.gates = args_util.get(args, "lazy_every"), args_util.get(args, "lazy_gates")

    def add_to_script_impl(self, script: Any) -> None:
        script.add_import(imports=["LazyRunner"], frm="lazy_compile.integrations.polygraphy")
        script.add_runner(
            make_invocable("LazyRunner", self.arg_groups[ModelArgs].path, every=self.every, gates=self.gates)
        )


def arguments() -> Sequence[BaseRunnerArgs]:
    """The entry point ``polygraphy.run.plugins``."""
    return [LazyRunnerArgs()]
