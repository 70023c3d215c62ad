"""What discovery is expected to find in a zoo model, as text; ``make zoo-golden`` (MODELS="A B" for some) writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from lazy_compile.errors import LazyCompileError
from lazy_compile.ir.branch import BranchTensor, ResidualBranch
from zoo.registry import zoo
from zoo.subject import Subject, subject

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> str:
    path = FOLDER / f"{name}.txt"
    return path.read_text() if path.exists() else f"there is no {path.name}; look at what `make zoo-golden` writes"


def described(subject: Subject) -> str:
    """One line for each branch: name, kind, what its gate reads -> what is cached, its share of all MACs."""
    graph = subject.graph
    lines = [f"time: {graph.timestep_input}"]
    if graph.guarded_inputs:
        lines.append(f"guarded by value: {', '.join(graph.guarded_inputs)}")
    width = max(len(branch.name) for branch in graph.branches)
    lines += [_line(branch, width, graph.total_macs) for branch in graph.branches]
    lines += [f"refused: {refusal.path}: {refusal.reason.partition(' (')[0]}" for refusal in graph.program.refusals]
    return "\n".join(lines) + "\n"


def _line(branch: ResidualBranch, width: int, total: int) -> str:
    borders = f"{_shapes(branch.entries)} -> {_shapes(branch.outputs)}"
    mixes = "" if branch.row_separable else f"  one decision: {branch.why_not_separable}"
    return f"{branch.name:{width}}  {branch.kind.value:15}  {branch.macs / total:5.1%}  {borders}{mixes}"


def _shapes(tensors: tuple[BranchTensor, ...]) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors)


if __name__ == "__main__":
    for name in sys.argv[1:] or zoo():
        try:
            (FOLDER / f"{name}.txt").write_text(described(subject(name)))
        except LazyCompileError as error:
            print(f"{name}: {error}", file=sys.stderr)
