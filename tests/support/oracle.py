"""What a lazy model must return, found without the package: hooks on the original that replace module outputs.

A branch is the output of a named module. Whether it computes is asked for every row of the batch; a row that does not
compute takes its last computed output, or the line through its last two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Decision = Callable[[int, int, Tensor], Sequence[bool]]
"""Step, branch and the module's input -> one decision for each row."""


class Oracle:
    """Calls ``model`` step by step as a lazy model would.

    Args:
        model: the original; its hooks are taken off again after every call.
        modules: path of the module whose output is branch 0, 1, ...
        decide: a :data:`Decision`, or a table ``bool[steps, branches]`` or ``bool[steps, branches, rows]``.
        reuse: ``"last"`` or ``"linear"``.
        slopes: ``float[steps, branches]``, how far a reuse follows the line; None: all the way.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[str], decide: Any, reuse: str, slopes: np.ndarray | None = None
    ) -> None:
        self.slopes = slopes
        self.model, self.modules, self.reuse = model, list(modules), reuse
        self.decide: Decision = decide if callable(decide) else _by_table(np.asarray(decide, dtype=bool))
        self.decisions: list[list[list[bool]]] = []
        self.history: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        self.step = 0

    @torch.no_grad()
    def __call__(self, **arguments: Any) -> Any:
        self.decisions.append([[] for _ in self.modules])
        hooks = [
            self.model.get_submodule(path).register_forward_hook(self._hook(branch))
            for branch, path in enumerate(self.modules)
        ]
        try:
            return self.model(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
            self.step += 1

    def run(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        return [self(**arguments) for arguments in calls]

    def _hook(self, branch: int) -> Callable[..., Tensor]:
        def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            computes = list(self.decide(self.step, branch, inputs[0]))
            self.decisions[-1][branch] = computes
            return torch.stack([self._row(branch, row, output[row], computes[row]) for row in range(len(output))])

        return replace

    def _row(self, branch: int, row: int, fresh: Tensor, computes: bool) -> Tensor:
        computed = self.history.setdefault((branch, row), [])
        if computes or not computed:
            computed.append((self.step, fresh))
            return fresh
        step, value = computed[-1]
        if self.reuse == "last" or len(computed) < 2:
            return value
        step_before, value_before = computed[-2]
        slope = 1.0 if self.slopes is None else float(self.slopes[self.step, branch])
        return value + slope * (self.step - step) / (step - step_before) * (value - value_before)


def _by_table(table: np.ndarray) -> Decision:
    def decide(step: int, branch: int, entry: Tensor) -> list[bool]:
        return np.broadcast_to(table[step, branch], len(entry)).tolist()

    return decide


def gates(weights: np.ndarray, biases: np.ndarray) -> Decision:
    """LazyDiT's rule on a module's input: compute where ``mean_over_tokens(input) . w + b > 0``, never before step 1.

    Args:
        weights: ``float[steps, branches, channels]``.
        biases: ``float[steps, branches]``.
    """

    def decide(step: int, branch: int, entry: Tensor) -> list[bool]:
        score = entry.double().mean(dim=1) @ torch.from_numpy(weights[step, branch]) + biases[step, branch]
        return [step == 0 or bool(value > 0) for value in score]

    return decide
